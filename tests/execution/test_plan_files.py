"""Plan files that are damaged or made up: refused by a ValueError, or loaded as something that runs."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

import spnet
from spnet.analysis.macs import Macs
from spnet.execution.plan import _digest
from spnet.execution.table import IDENTITY, PAD, Block, Convolution, Network, read_table
from tests.conftest import VARIANTS, settle, vary

EXAMPLES = settings(max_examples=300)
INTEGERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**k + d for k in (7, 8, 12, 15, 16, 31, 32, 62) for d in (-1, 0, 1)]),
    st.sampled_from([-(2**k) for k in (8, 16, 31, 32, 62, 63)] + [2**63 - 1]),
)


class Saved:
    """A plan, its file, and what the file says."""

    def __init__(self):
        torch.manual_seed(0)
        model = spnet.models.SPNet(
            [1, 2], [3, 5], num_classes=4, input_size=7, in_channels=2, shortcut="projection", router_width=6
        )
        self.plan = spnet.lower(settle(vary(model, VARIANTS)))
        self.x = torch.randn(3, 2, 7, 7)
        self.path = Path(tempfile.mkdtemp()) / "plan.safetensors"
        self.plan.save(self.path)
        self.bytes = self.path.read_bytes()
        with safe_open(self.path, framework="pt") as f:
            self.metadata = f.metadata()
            self.tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
        del self.metadata["sha256"]

    def answers(self, plan) -> tuple:
        logits, paths = plan(self.x, return_paths=True)
        return logits.tolist(), paths.decisions.tolist(), paths.macs.tolist(), paths.dense_macs, paths.blocks

    def load(self, data: bytes):
        """The plan that the bytes hold, or None where they are refused."""
        self.path.write_bytes(data)
        try:
            return spnet.load_plan(self.path)
        except ValueError:
            return None


@pytest.fixture(scope="module")
def saved():
    return Saved()


def test_the_whole_file_is_not_refused(saved):
    assert saved.answers(saved.load(saved.bytes)) == saved.answers(saved.plan)


def test_a_plan_outlives_its_file(saved):
    plan = saved.load(saved.bytes)
    saved.path.write_bytes(b"")
    plan.save(saved.path)
    assert saved.answers(spnet.load_plan(saved.path)) == saved.answers(saved.plan)


@EXAMPLES
@given(data=st.data())
def test_damaged_bytes(saved, data):
    """Refused, or the very same plan: never other answers."""
    damaged = bytearray(saved.bytes)
    place = st.integers(0, len(damaged) - 1)
    near_the_front = st.integers(0, 700)  # where names, types and shapes stand
    kind = data.draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "remove", "swap", "header length"]))
    if kind == "cut":
        del damaged[data.draw(place) :]
    elif kind == "flip":
        for at in data.draw(st.lists(place | near_the_front, min_size=1, max_size=5)):
            damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "overwrite":
        at, new = data.draw(place | near_the_front), data.draw(st.binary(min_size=1, max_size=64))
        damaged[at : at + len(new)] = new
    elif kind == "insert":
        at = data.draw(place | near_the_front)
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "remove":
        at = data.draw(place | near_the_front)
        del damaged[at : at + data.draw(st.integers(1, 64))]
    elif kind == "swap":
        a, b, n = data.draw(place), data.draw(place), data.draw(st.integers(1, 64))
        damaged[a : a + n], damaged[b : b + n] = damaged[b : b + n], damaged[a : a + n]
    else:
        damaged[:8] = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(damaged))).to_bytes(8, "little")
    plan = saved.load(bytes(damaged))
    if plan is not None:
        assert saved.answers(plan) == saved.answers(saved.plan)


def _sealed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file whose checksum is right, whatever it says."""
    return save(tensors, metadata | {"sha256": _digest(tensors, metadata)})


@EXAMPLES
@given(data=st.data())
def test_made_up_tables(saved, data):
    """Of other integers: refused, or a network that runs."""
    tensors = {name: t.clone() for name, t in saved.tensors.items()}
    for name in data.draw(st.lists(st.sampled_from(["table", "table", "costs", "total"]), min_size=1, max_size=3)):
        flat = tensors[name].flatten()
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(INTEGERS)
        tensors[name] = flat.reshape(tensors[name].shape)
    plan = saved.load(_sealed(tensors, saved.metadata))
    if plan is not None:
        assert math.prod(plan.input_shape) < 2**24
        logits, paths = plan(torch.zeros(2, *plan.input_shape), return_paths=True)
        assert logits.shape == (2, plan.num_classes)
        assert paths.decisions.shape == (2, plan.num_blocks)


@EXAMPLES
@given(data=st.data())
def test_made_up_tensors(saved, data):
    """Of other names, types, lengths and shapes, and metadata that says something else: always refused."""
    tensors, metadata = {name: t.clone() for name, t in saved.tensors.items()}, dict(saved.metadata)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(
        st.sampled_from(["drop", "rename", "swap", "type", "shape", "shorten", "lengthen", "say", "say nothing"])
    )
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[data.draw(st.text(max_size=5)) + "_"] = tensors.pop(name)
    elif kind == "swap":
        other = data.draw(st.sampled_from(sorted(tensors.keys() - {name})))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "type":
        types = (torch.bool, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
        others = [dtype for dtype in types if dtype != tensors[name].dtype]
        tensors[name] = tensors[name].to(data.draw(st.sampled_from(others)))
    elif kind == "shape":
        shape = data.draw(st.sampled_from([(1, -1), (-1, 1), (1, 1, -1)]))
        tensors[name] = tensors[name].reshape(shape)
    elif kind == "shorten":
        tensors[name] = tensors[name].flatten()[: data.draw(st.integers(0, tensors[name].numel() - 1))]
    elif kind == "lengthen":
        more = data.draw(st.integers(1, 40))
        tensors[name] = torch.cat([tensors[name].flatten(), tensors[name].new_zeros(more)])
    elif kind == "say":
        entry = data.draw(st.sampled_from(sorted(metadata)))
        said = data.draw(st.text() | st.sampled_from(["", "0", "nan", "float16", "int64", "\n" * 1000]))
        metadata[entry] = said + "\n" if entry == "blocks" else said + " "
    else:
        del metadata[data.draw(st.sampled_from(sorted(metadata)))]
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    saved.path.write_bytes(_sealed(tensors, metadata))
    with pytest.raises(ValueError, match=r"."):
        spnet.load_plan(saved.path)


def test_a_network_without_blocks(tmp_path):
    network = Network(1, 8, 8, 3, (0, 0, 0), (Convolution(1, 4, 3, 1, 1),), ())
    weights = torch.randn(sum(math.prod(shape) for shape in network.shapes()))
    plan, x = spnet.Plan(network.table(), weights, Macs(1, 1, ())), torch.randn(2, 1, 8, 8)
    plan.save(tmp_path / "plan")
    for impl in ("walk", "batch"):
        assert torch.equal(spnet.load_plan(tmp_path / "plan")(x, impl=impl), plan(x, impl=impl))


def test_relus_that_a_plan_cannot_have():
    conv = Convolution(4, 4, 3, 1, 1, relu=1)
    block = Block((conv, conv._replace(relu=0)), IDENTITY, 1, 0, 6)
    network = Network(1, 8, 8, 3, (0, 0, 0), (conv._replace(cin=1),), (block,))
    assert read_table(network.table()) == network
    for changed, message in (
        (network._replace(stem=(conv._replace(cin=1, relu=0),)), "block 0: relu, as what .* from no ReLU: expected 0"),
        (network._replace(blocks=(block, block._replace(shortcut=PAD)._replace(relu=0), block)), "block 2: relu, as"),
        (
            network._replace(blocks=(block._replace(body=(conv, conv)),)),
            "block 0: relu of the body.s last",
        ),
        (network._replace(blocks=(block._replace(relu=2),)), "block 0: relu: expected 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(changed.table())
