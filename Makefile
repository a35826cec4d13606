# Two commands set everything up: `make demo` and `make test`. The tests in other environments take several GB more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses=logical --dist=worksteal
SETUP := $(VENV)/.set-up
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/*/*)
# What Python compiles stays, or each of the many processes that tests start would compile PyTorch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test sanitize sanitize-address sanitize-thread test-oldest test-vision lint format bench clean

demo: $(SETUP)
	$(BIN)/spnet demo

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

# The native core under AddressSanitizer with UndefinedBehaviorSanitizer, and its threads under ThreadSanitizer. Only
# the core is instrumented; the sanitizer is loaded before Python, so that it also hands out the memory of tensors. Left
# out is what compiles, starts another core, or walks the same ways with other numbers or by shorter vectors.
sanitize:
	$(MAKE) --no-print-directory --jobs=$$(nproc) --output-sync=target sanitize-address sanitize-thread

CORE_TESTS := tests/test_native.py tests/test_walk_core.py tests/test_watch.py tests/test_cuda_walk.py

sanitize-address: build/address/_core.so
	$(call under,asan) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 $(call pytest,$<) $(PARALLEL) \
	  $(CORE_TESTS) tests/execution/test_kept.py tests/execution/test_plan_files.py \
	  -k "not (compile or opcheck or cuda_kernels or exit_with or bad_sample or nan_flows or changes_no_bit or \
	    batch_splits or carries_nothing_over or the_plan_follows or (cuda_walk and bfloat16) or $(SHORTER) or no-strips)"

sanitize-thread: build/thread/_core.so
	$(call under,tsan) TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 $(call pytest,$<) \
	  $(CORE_TESTS) tests/execution/test_walk.py -k "(thread or every_place or (cuda_walk and forced_paths and 5)) \
	    and not ($(SHORTER) or no-strips or preactivated or between)"

# With addresses that are not random, where the system lets it: the shadow memory of GCC 12 needs them on new kernels.
under = $(FIXED_ADDRESSES) env LD_PRELOAD="$(call library,$1) $(call library,stdc++)"
# What a sanitizer writes is not captured.
pytest = SPNET_TEST_CORE=$1 $(BIN)/python -m pytest -p tests.sanitize --capture=sys
library = $(shell $(CXX) -print-file-name=lib$1.so)
FIXED_ADDRESSES = $(shell setarch --addr-no-randomize true 2>/dev/null && echo setarch --addr-no-randomize)

# What this processor cannot run needs no build.
AVX512 = $(shell grep -qs avx512bw /proc/cpuinfo && echo ON || echo OFF)
SHORTER = v2-float32$(if $(filter ON,$(AVX512)), or avx2-float32)
build/address/_core.so: SANITIZERS := address,undefined,float-cast-overflow
build/thread/_core.so: SANITIZERS := thread
build/%/_core.so: $(SETUP) $(NATIVE)
	$(BIN)/cmake -S . -B $(@D) -G "Unix Makefiles" -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_BUILD_TYPE= \
	  -DCMAKE_CXX_FLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all" \
	  -DSPNET_CUDA=OFF -DSPNET_AVX512=$(AVX512) -DSPNET_MODULE_NAME=$(@F) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(MAKE) -C $(@D)
	touch $@

test-oldest: .venv-oldest/.set-up
	.venv-oldest/bin/python -m pytest $(PARALLEL)
	.venv-oldest/bin/python -m spnet.kernels.check

test-vision: .venv-vision/.set-up
	.venv-vision/bin/python -m pytest $(PARALLEL) tests/vision tests/models tests/execution tests/test_api.py \
	  tests/test_routing.py tests/training/test_folders.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(NATIVE))

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu,$(NATIVE))

bench: $(SETUP)
	$(BIN)/python -m pytest bench/ --benchmark-only

# Not compiled by pip: Python compiles what it imports, all of torch would take half a minute.
$(SETUP): pyproject.toml constraints.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

.venv-oldest/.set-up: PACKAGES := --editable '.[test]'
# Networks of others, on the newest torch that spnet is known to work with.
.venv-vision/.set-up: PACKAGES := --editable '.[test,vision,hub]' timm
.venv-%/.set-up: pyproject.toml constraints.txt constraints-%.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(@D)
	awk -F== 'NR == FNR { own[$$1] } NR == FNR || !($$1 in own)' constraints-$*.txt constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-compile --constraint $(@D)/constraints.txt $(PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info spnet/_core*.so
