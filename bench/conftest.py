"""What every result file says about the machine that it was measured on."""

import torch

import spnet


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(spnet.build_info())
    if torch.cuda.is_available():
        machine_info["device"] = torch.cuda.get_device_name()
