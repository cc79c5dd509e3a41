# make demo: the main job, shown. make test: all tests on the default kernel. Both set up what they need (Debian, root
# or sudo) and keep what is slow to make under the user's cache directory.
#
# A test that is skipped is a failure, unless VDPABRIDGE_ALLOW_SKIPS=1 is set: then the reason is printed.

VDPABRIDGE_PYTHON := $(shell .ci/environment)
ifeq ($(VDPABRIDGE_PYTHON),)
$(error setting up Python failed: see above)
endif
export VDPABRIDGE_PYTHON VDPABRIDGE_ALLOW_SKIPS

PYTHON := "$(VDPABRIDGE_PYTHON)"
RUN := vm-images/run
SUITE = $(RUN) $* --env VDPABRIDGE_ALLOW_SKIPS=$(VDPABRIDGE_ALLOW_SKIPS) $(if $(TEST),--test '$(TEST)')
KERNELS := 6.12 6.1 newest
# the same with the proposal of device state (vm-images/kernel/patches)
PATCHED := 6.12-state newest-state
# make test-kernels KERNEL=debug TEST=suspend: that one only, and of the suite what matches (pytest's -k)
NAMED := $(KERNELS) $(PATCHED) debug debug-state
# without a machine to boot (exit code 121) nothing is tested, which has to be allowed
SKIPPABLE = || { code=$$?; [ $$code = 121 ] && [ "$(VDPABRIDGE_ALLOW_SKIPS)" = 1 ] && echo "skipped: no test machine, see above"; }

# how long CI lets the fuzzer try
FUZZ_S := 60

.PHONY: docs release deb test-deb demo bench soak fuzz mutations test-install test test-unit test-kernels images lint test-state test-proposal test-broken-kernels
.PHONY: $(NAMED:%=image-%) image-6.12-other $(NAMED:%=test-kernel-%) test-kernel-next test-kernel-next-state
.NOTPARALLEL:

demo: image-6.12
	@$(RUN) 6.12 -- python3 -m demo || { code=$$?; [ $$code = 1 ] || echo "demo: FAIL: the test machine ended with code $$code"; exit $$code; }

# not at once: guests of QEMU that are emulated take too long on processors that are busy
test: lint test-unit test-kernel-6.12

# the runner's own tests boot this kernel: made here, where its progress can be seen
test-unit: image-6.12
	$(PYTHON) -m pytest

test-kernels: $(if $(KERNEL),$(KERNEL:%=test-kernel-%),$(KERNELS:%=test-kernel-%) $(PATCHED:%=test-kernel-%) test-kernel-next test-kernel-next-state)

# device state on a kernel that has it, by the tests for that alone; make test-kernels runs all tests on all of them
STATE_KERNEL := $(or $(KERNEL),$(firstword $(PATCHED)))
STATE_TESTS := tests/vm/state tests/vm/test_promises.py tests/vm/test_promises_resume.py
test-state: image-$(STATE_KERNEL)
	$(RUN) $(STATE_KERNEL) --env VDPABRIDGE_ALLOW_SKIPS=$(VDPABRIDGE_ALLOW_SKIPS) -- python3 -m tests.ktap $(STATE_TESTS) $(SKIPPABLE)

# the same by requests of another proposal, which nothing here knows but a TOML file
test-proposal: image-6.12-other
	$(RUN) 6.12-other --env VDPABRIDGE_ALLOW_SKIPS=$(VDPABRIDGE_ALLOW_SKIPS) --env VDPABRIDGE_UAPI=vm-images/kernel/other/proposal.toml -- \
		python3 -m tests.ktap tests/vm/state/test_device_state.py tests/vm/state/test_mount.py $(SKIPPABLE)

# kernels that are broken on purpose: each has to be caught by the test that its patch names. Takes a quarter of an hour
test-broken-kernels:
	PYTHONPATH=vm-images $(PYTHON) -m tests.broken $(BROKEN)

# the release candidate that Debian offers at the moment, if there is one
test-kernel-next test-kernel-next-state: test-kernel-%:
	@$(SUITE) || { code=$$?; [ $$code = 4 ] && echo "test-kernel-$*: NOTHING WAS TESTED, see above"; }

images: $(KERNELS:%=image-%) image-$(firstword $(PATCHED))

$(NAMED:%=image-%) image-6.12-other: image-%:
	@$(RUN) $* --build-only >/dev/null $(SKIPPABLE)

$(NAMED:%=test-kernel-%): test-kernel-%: image-%
	$(SUITE) $(SKIPPABLE)

# a part of the tests for a long time: a log that begins and ends under load
soak: image-6.12
	$(RUN) 6.12 --env VDPABRIDGE_ROUNDS=1000 --test to_and_fro

# never part of the tests: machines are shared and noisy
bench: image-6.12
	@PYTHONPATH=vm-images $(PYTHON) -m tests.bench $(BENCH)

fuzz:
	corpus=$$(mktemp -d) && trap 'rm -rf "$$corpus"' EXIT && "$$(.ci/environment fuzz)" -m tests.fuzz -max_total_time=$(FUZZ_S) \
		-max_len=600 -verbosity=0 -artifact_prefix=tests/fuzz/regressions/found- "$$corpus" tests/fuzz/regressions

# HTML of the public API, man pages and shell completion, in build/docs
docs:
	.ci/docs "$$(.ci/environment docs)"

# a package for Debian 13, and whether it works on one: the test machine is one
deb: docs
	.ci/deb $(PYTHON)

test-deb: deb image-6.12
	$(RUN) 6.12 --with "$$(ls -t build/vdpabridge_*.deb | head -1)" --with tests/deb.sh -- sh /run/payload/with/deb.sh

# what goes to a package index, checked; CONTRIBUTING.md has the other steps of a release
release:
	.ci/release "$$(.ci/environment release)"

# one mistake at a time in a copy of the code: does a test notice? Takes some minutes
mutations:
	$(PYTHON) -m tests.mutations

# the package as its users have it: installed alone, used without root
test-install:
	tests/install.sh

lint:
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --quiet --check .
	$(PYTHON) -m mypy --no-error-summary
