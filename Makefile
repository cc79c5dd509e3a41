# make demo: the main job, shown. make test: all tests on the default kernel. Both set up what they need (Debian, root
# or sudo) and keep what is slow to make under the user's cache directory.

PYTHON := $(shell .ci/environment)
ifeq ($(PYTHON),)
$(error setting up Python failed: see above)
endif

export PYTHON
KERNELS := 6.12 6.1 newest
RUN := vm-images/run

.PHONY: demo test test-unit test-kernels $(KERNELS:%=test-kernel-%) lint

demo:
	@$(RUN) -- python3 -m demo || { code=$$?; [ $$code = 1 ] || echo "demo: FAIL: the test machine ended with code $$code"; exit $$code; }

test: lint test-unit test-kernel-6.12

test-unit:
	$(PYTHON) -m pytest

test-kernels: $(KERNELS:%=test-kernel-%)

$(KERNELS:%=test-kernel-%): test-kernel-%:
	$(RUN) $* --env VDPABRIDGE_NO_SKIPS=$(VDPABRIDGE_NO_SKIPS)

lint:
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --quiet --check .
	$(PYTHON) -m mypy --no-error-summary
