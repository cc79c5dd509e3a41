"""Back-ends that are killed, stopped or fall silent at any message of save, load or migrate; enumerated, not sampled.

Never do two devices run; and the guest's requests are done to the end by the device that the report names, or, once
the process that does not answer is ended, by following its advice.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.device import RunState
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.state.image.reader import ImageError
from vdpabridge.state.procedures import Advice, ProcedureFailed, load, migrate, save, verify
from vdpabridge.state.snapshot import restore

from ...support.disk_lab import DISK_BYTES, Lab, limits
from ...support.nursery import FAULTS, KINDS, nursery
from ...support.transitions import shared_file

#: How long a back-end may take where one is meant not to answer. One that is merely slow fails too: then once more, with
#: more time.
PATIENCES_S = (0.5, 1.5, 5)
AT_ONCE = 4


class Pair:
    """Two processes and the guest whose disk moves."""

    def __init__(self, stack, back_end, disk):
        self.source_process = stack.enter_context(back_end(disk))
        self.destination_process = stack.enter_context(back_end(disk))
        self.source = stack.enter_context(self.source_process.open())
        self.work = Lab(stack, self.source)
        self.destination = stack.enter_context(self.destination_process.open())
        self.destination.map([self.work.memory.region])

    def process(self, side):
        return self.source_process if side == "source" else self.destination_process

    def impatient(self, timeout_s):
        self.source.timeout_s = self.destination.timeout_s = timeout_s

    def was_slow(self, meant):
        """Whether the other than ``meant`` has not answered either: this machine is busy."""
        other = self.source if meant == "destination" else self.destination
        return other.state is RunState.FAILED and "no answer within" in other.failure


@contextmanager
def pair(back_end, *, with_state):
    """With state, or with one disk behind both."""
    with ExitStack() as stack, tempfile.NamedTemporaryFile() as disk:
        disk.truncate(DISK_BYTES)
        yield Pair(stack, back_end, "" if with_state else disk.name)


def do_migrate(those, timeout_s, _image):
    return migrate(those.source, those.destination, limits(timeout_s=timeout_s))


def do_save(those, timeout_s, image):
    return save(those.source, image, limits(timeout_s=timeout_s))


def do_load(those, timeout_s, image):
    return load(those.destination, image, limits(timeout_s=timeout_s), those.work.eventfds)


PROCEDURES = {"migrate": do_migrate, "save": do_save, "load": do_load}
SIDES = {"migrate": ("source", "destination"), "save": ("source",), "load": ("destination",)}


@contextmanager
def image_for(procedure, those):
    """A file to save to; or, for a load, one with the image of the source, which stays suspended."""
    with shared_file(0) as file:
        if procedure == "load":
            save(those.source, file, limits(), stay_suspended=True)
            os.lseek(file, 0, os.SEEK_SET)
        yield file


def count_events(procedure, back_end, *, with_state):
    """(side, kind of event) -> how many of them there are, where nothing goes wrong."""
    with pair(back_end, with_state=with_state) as those, image_for(procedure, those) as image:
        places = [(side, kind) for side in SIDES[procedure] for kind in KINDS]
        before = {(side, kind): those.process(side).events(kind) for side, kind in places}
        PROCEDURES[procedure](those, 20, image)
        counts = {(side, kind): those.process(side).events(kind) - before[side, kind] for side, kind in places}
        those.work.finish()
    return counts


@pytest.mark.parametrize("with_state", [True, False], ids=["with state", "without"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_at_every_message(procedure, fault, with_state, tmp_path):
    with nursery(tmp_path) as back_end, ThreadPoolExecutor(AT_ONCE) as pool:
        counts = count_events(procedure, back_end, with_state=with_state)
        fewest = {"message": 5, "piece": 2 if with_state else 0}
        assert all(count >= fewest[kind] for (_, kind), count in counts.items()), counts
        places = [(*place, number) for place, count in counts.items() for number in range(1, count + 1)]
        # most of the time they wait
        list(pool.map(lambda place: one(back_end, procedure, fault, *place, with_state=with_state), places))


def one(back_end, procedure, fault, side, kind, number, *, with_state):
    try:
        for timeout_s in PATIENCES_S:
            with pair(back_end, with_state=with_state) as those:
                try:
                    go_wrong_once(those, procedure, fault, side, kind, number, timeout_s)
                    return
                except AssertionError:
                    if timeout_s == PATIENCES_S[-1] or not those.was_slow(side):
                        raise
    except BaseException as error:
        error.add_note(f"{procedure}: {side} {fault} at {kind} {number}")
        raise


def go_wrong_once(those, procedure, fault, side, kind, number, patience_s):
    with image_for(procedure, those) as image:
        timeout_s = 20 if fault == "killed" else patience_s
        if fault != "killed":
            those.impatient(patience_s)
        those.process(side).arm(kind, number, fault)
        try:
            PROCEDURES[procedure](those, timeout_s, image)
        except VdpaBridgeError as error:
            CHECKS[procedure](those, side, fault, error, image)
            return
        # the last step of a migration, to reset the source, may fail: the destination runs all the same; and state may
        # come in fewer pieces than it did before
        assert (procedure, side) == ("migrate", "source") or kind == "piece"
        if procedure == "migrate":
            those.source_process.kill()
        those.work.finish()


def failed_step(error):
    """The step that failed first; none where it was found out before anything was done."""
    steps = error.report.steps if isinstance(error, ProcedureFailed) else []
    return next((step.name for step in steps if step.failed), "")


def check_migrate(those, side, fault, error, _image):
    step = failed_step(error)
    if not step:
        # what is asked first was not answered: nothing has begun
        assert those.source.state is RunState.RUNNING or side == "source"
        check_source_that_failed_alone(those, side, fault, error)
    elif side == "destination" and step != "start":
        assert error.running == those.source.name
        those.destination_process.kill()
        those.work.finish()
    elif side == "destination":
        check_failed_start(those, fault, error)
    else:
        check_failed_source(those, fault, error)


def check_source_that_failed_alone(those, side, fault, error):
    """Nobody has told the device to stop: it works on, unless its process cannot."""
    if side == "destination":
        those.destination_process.kill()
    if side == "source" and fault == "killed":
        return
    if side == "source":
        those.source_process.go_on()
    those.work.finish()


def was_kicked(error):
    """Whether a ring may have been kicked when a start failed: what tells where the rings are comes before."""
    before = ("SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_ERR")
    return not any(name in str(error.__cause__) for name in before)


def check_failed_start(those, fault, error):
    if error.running == those.source.name:
        assert error.advice in (Advice.AGAIN, Advice.OTHER_DESTINATION)
        if fault != "killed":
            assert not was_kicked(error), "before its first kick nothing runs, and never will"
            those.destination_process.go_on()
        those.work.finish()
        return
    assert those.source.state is RunState.SUSPENDED
    if fault == "killed":
        assert "begun to work" in error.running
        assert error.advice is Advice.RESET
    else:
        assert error.running.startswith("not known: ")
        assert error.advice is Advice.END
        those.destination_process.kill()
    worked = those.work.queue.device_used_index != error.snapshot.queues[0].base.avail_index
    assert worked or fault != "killed"
    if not worked:
        those.source.resume()
        those.work.finish()


def check_failed_source(those, fault, error):
    assert those.destination.state is RunState.RESET
    those.destination_process.kill()
    if fault == "killed":
        assert error.running.startswith("nothing: ")
        assert "closed the connection" in error.running or failed_step(error) == "resume"
        return
    assert error.running.startswith(("nothing", "not known: "))
    those.source_process.go_on()
    revive(those, fault, error)


def revive(those, fault, error):
    """What a user does with a source that answers again, or whose process works on: a front-end begins anew."""
    if fault == "mute" or failed_step(error) == "resume":
        # it never will; or it has gone on by itself, and nobody is left who could be asked how far
        return
    snapshot = error.snapshot
    those.source.timeout_s = 10
    if those.source.state is RunState.RUNNING:
        those.source.suspend()
        those.source.resume()
        those.work.finish()
        return
    those.source.close()
    if snapshot is None:
        assert failed_step(error) == "capture"
        return
    with those.source_process.open() as again:
        again.map([those.work.memory.region])
        restore(again, snapshot, those.work.eventfds)
        again.start()
        those.work.finish()


def check_save(those, side, fault, error, image):
    os.lseek(image, 0, os.SEEK_SET)
    if failed_step(error) == "resume":
        verify(image, limits())
    else:
        with pytest.raises(ImageError):
            verify(image, limits())
    if not failed_step(error):
        check_source_that_failed_alone(those, side, fault, error)
    else:
        check_failed_source(those, fault, error)


def check_load(those, side, fault, error, image):
    """The image is good for another device: the source, as it is here, and was suspended for it."""
    if isinstance(error, ProcedureFailed):
        kicked = failed_step(error) == "start" and was_kicked(error)
        assert error.running.startswith("not known: " if kicked and fault != "killed" else "nothing")
    those.destination_process.kill()
    worked = those.work.queue.device_used_index != those.source.get_base(0).avail_index
    if not worked:
        those.source.resume()
        those.work.finish()


CHECKS = {"migrate": check_migrate, "save": check_save, "load": check_load}
