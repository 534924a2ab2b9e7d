"""The model test of the block device's rings: a random driver that keeps to every rule, in every
combination of what rings can be and of what can happen to them.

Rings are split and packed, of 2 to 256 entries, with and without EVENT_IDX, INDIRECT_DESC and
IN_ORDER.  Chains have 1 to 7 descriptors and some have 60, cut anywhere, direct, indirect or both,
in tables that may be longer than the ring.  Requests come alone or in crowds, some of them
write-zeroes that are more than a pass serves.  Meanwhile the rate limit changes, sectors go bad,
rings are stopped and go on where they were, devices are saved and others take their state, front
ends and exports come again, and queues and devices are reset.  The fast path, and the general path
alone.

Every request must be answered once, in order, with its own data, the status and the length of the
model; the disk must in the end be the model's; and nothing of RAM may change that was not asked
for.  A driver that notifies when it is asked to, and only then, must never wait for ever, nor
miss an interrupt.

An episode is made of its seed alone: ``PYVMM_SOAK_SEED=N`` plays number N, ``PYVMM_SOAK_S=T`` plays
new ones for T seconds (``make soak``).
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from pyvmm.virtio import device
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.block.fast import path as fast_path
from pyvmm.virtio.device import PASS_BYTES
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.block_model import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    WRITE_ZEROES,
    Damage,
    LiveModel,
)
from tests.support.busy_disks import BusyMemory, BusyRaw
from tests.support.general_path import GeneralBlockDevice
from tests.support.legal_driver import QUEUE_SECTORS, Arena, Habits, LegalQueue, MirroredMemory
from tests.support.packed_driver import PackedDriver
from tests.support.ring_machines import (
    FAR_BASE,
    REGION_BYTES,
    ExportMachine,
    Machine,
    MmioMachine,
)
from tests.support.virtio_driver import RAM_BASE, BlockDriver

SHORT_S, SHORT_EPISODES = 4.0, 80
QUEUE_BYTES = 32 << 10
"""RAM for one queue's areas, which begin anywhere in it."""
MAX_SIZE = 256
OPTIONAL = (
    Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER, Feature.RING_PACKED,
    BlockFeature.FLUSH, BlockFeature.CONFIG_WCE, BlockFeature.DISCARD, BlockFeature.WRITE_ZEROES,
)  # fmt: skip
ALL_KINDS = (IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, WRITE_ZEROES, 77)
WRITES_AND_ZEROES = (OUT, WRITE_ZEROES, WRITE_ZEROES)
TRANSFERS = (IN, OUT, OUT)


class Episode:
    """One machine and the driver's queues, from nothing to the end."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = rng = random.Random(seed)
        self.log: deque[str] = deque(maxlen=40)
        self.queue_count = rng.choice((1, 1, 2))
        config = BlockConfig(
            serial="model", queues=self.queue_count, queue_size=rng.choice((16, 64, MAX_SIZE)),
            writeback=rng.random() < 0.8, rate_limit=self.some_limit(),
        )  # fmt: skip
        # Half of them have passes so short that some end in the middle of every crowd.
        self.pass_bytes = rng.choice((PASS_BYTES, PASS_BYTES, 1 << 16, 1 << 13))
        self.max_size = config.queue_size
        self.path = folder / "model.img"
        self.model = LiveModel(self.queue_count * QUEUE_SECTORS)
        self.disk = bytearray(len(self.model.sectors) * 512)
        self.backend = self.some_backend()
        device_type = GeneralBlockDevice if rng.random() < 0.2 else BlockDevice
        self.machine: Machine
        if rng.random() < 0.7:
            self.machine = MmioMachine(config, self.backend, device_type, rng)
        else:
            path = folder / "model.sock"
            self.machine = ExportMachine(config, self.backend, device_type, path, rng)
        self.setting = (
            f"{type(self.machine).__name__} {device_type.__name__} {type(self.backend).__name__},"
            f" passes of {self.pass_bytes} bytes, {config}"
        )
        self.memory = MirroredMemory(self.machine.memory)
        self.machine.see = self.see_all
        self.queues: list[LegalQueue] = []
        self.is_driving = True  # the driver is at work, so it can not be asked in between
        self.features = 0
        self.boot()

    def some_backend(self) -> BusyRaw | BusyMemory:
        backend: BusyRaw | BusyMemory
        if self.rng.random() < 0.6:
            with self.path.open("wb") as file:
                file.truncate(len(self.disk))
            backend = BusyRaw(str(self.path), report=self.fail)
        else:
            backend = BusyMemory(self.disk)
        backend.on_io = self.in_between
        return backend

    def some_limit(self) -> RateLimit:
        """None, mostly; else one that many requests have to wait for."""
        rng = self.rng
        if rng.random() < 0.7:
            return RateLimit()
        ops = rng.choice((0, 100, 1000))
        many_bytes = rng.choice((0, 100_000, 10_000_000))
        return RateLimit(
            ops_per_s=ops, ops_burst=rng.randrange(1, 20) if ops else 0,
            bytes_per_s=many_bytes, bytes_burst=rng.randrange(1, 20_000) if many_bytes else 0,
        )  # fmt: skip

    # The driver's doings

    def say(self, line: str) -> None:
        self.log.append(line)

    def fail(self, line: str) -> None:
        raise AssertionError(line)

    def boot(self) -> None:
        """From reset to queues that run, with other features each time."""
        rng = self.rng
        features = int(Feature.VERSION_1 | Feature.RING_RESET | BlockFeature.MQ)
        features |= sum(int(bit) for bit in OPTIONAL if rng.random() < 0.7)
        self.features = features & self.machine.offered
        self.model.restart(self.features)
        self.queues = [self.new_queue(index) for index in range(self.queue_count)]
        self.machine.boot([queue.driver for queue in self.queues], self.features)

    def new_queue(self, index: int) -> LegalQueue:
        """Queue ``index``, of another size and elsewhere than before."""
        rng = self.rng
        is_packed = bool(self.features & Feature.RING_PACKED)
        sizes = [2, 4, 8, 16, 64, 64, 256, 256]
        if is_packed:
            sizes += [3, 5, 7, 12, 33, 60, 250, rng.randrange(2, MAX_SIZE)]
        size = rng.choice([size for size in sizes if size <= self.max_size])
        kinds, large_zeroes = rng.choice((ALL_KINDS, TRANSFERS)), rng.choice((0.0, 0.1))
        if size > 32 and rng.random() < 0.3:  # more than a pass serves, and writes among it
            kinds, large_zeroes = WRITES_AND_ZEROES, 0.9
        bottom = RAM_BASE + index * QUEUE_BYTES + 2 * rng.randrange(QUEUE_BYTES // 4)
        kind = PackedDriver if is_packed else BlockDriver
        driver = kind(self.machine.registers, self.memory, size=size, index=index, bottom=bottom)
        driver.event_idx = bool(self.features & Feature.EVENT_IDX)
        if self.machine.has_bases and rng.random() < 0.5:  # often just before it begins anew
            driver.begin_at(rng.choice((0xFFFF, 0x8000)) - rng.randrange(300))
        each = (REGION_BYTES - self.queue_count * QUEUE_BYTES) // self.queue_count
        start = RAM_BASE + self.queue_count * QUEUE_BYTES + index * each
        far = FAR_BASE + index * each
        habits = Habits(
            far=rng.choice((0.0, 0.05, 0.4)),
            plain=rng.choice((0.0, 0.5, 1.0)),
            indirect=rng.choice((0.0, 0.3, 1.0)),
            large_zeroes=large_zeroes,
            sequential=rng.choice((0.0, 0.5, 0.95)),
            order=rng.choice(("last", "next", "any")),
            kinds=kinds,
        )
        what = f"{kind.__name__} {size} at {bottom:#x}, features {self.features:#x}, {habits}"
        self.say(f"queue {index}: {what}")
        arenas = Arena(start, start + each), Arena(far, far + each)
        return LegalQueue(
            driver, self.memory, arenas, self.model, self.features, habits=habits, rng=rng,
            longest_table=self.max_size,
        )  # fmt: skip

    def offer(self, queue: LegalQueue, most: int) -> None:
        """Offer up to ``most`` requests, and notify if the device asks for it."""
        count = 0
        while count < most and queue.offer():
            count += 1
        must_notify = queue.driver.must_notify()
        self.say(f"queue {queue.driver.index}: {count} offered, notify: {must_notify}")
        if must_notify:
            at_once = not self.is_driving and self.rng.random() < 0.4
            self.act(lambda: self.machine.notify(queue.driver.index, at_once=at_once))

    def in_between(self) -> None:
        """Called in the middle of a request: another vCPU goes on driving."""
        if not self.is_driving or self.rng.random() > 0.1:
            return
        queue = self.rng.choice(self.queues)
        queue.collect(self.rng.randrange(4))
        self.offer(queue, self.rng.randrange(1, 3))

    def act(self, what: Callable[[], None]) -> None:
        """Let the device do ``what``, then check all that the driver can see."""
        if self.is_driving:  # in the midst of something: it is checked afterwards
            what()
            return
        self.is_driving = True
        for queue in self.queues:
            self.machine.interrupted(queue.driver.index)
        before = [queue.used for queue in self.queues]
        what()
        self.see_all()
        self.is_driving = False
        for queue, used in zip(self.queues, before, strict=True):
            if queue.wants_interrupt(used):
                index = queue.driver.index
                assert self.machine.interrupted(index), f"no interrupt of queue {index}"
        for queue in self.queues:
            queue.ignore_device_areas()
        self.memory.check()
        self.machine.check()

    def see_all(self) -> None:
        seen = [queue.see() for queue in self.queues]
        if any(seen):
            self.say(f"used: {seen}")

    # What happens

    def play(self) -> int:
        """The whole episode; how many requests were answered."""
        rng = self.rng
        self.is_driving = False
        for _ in range(rng.randrange(20, 160)):
            queue = rng.choice(self.queues)
            chance = rng.random()
            if chance < 0.45:
                if rng.random() < 0.6:
                    queue.collect(MAX_SIZE)
                if rng.random() < 0.3:
                    queue.choose_interrupts()
                self.offer(queue, rng.choice((1, 1, 3, 14, MAX_SIZE)))
            elif chance < 0.6:
                self.act(self.machine.turn)
            elif chance < 0.75:
                queue.collect(rng.choice((1, 3, MAX_SIZE)))
            elif chance < 0.77:
                self.ask_one_by_one(queue)
            elif chance < 0.8:
                self.damage()
            elif chance < 0.85:
                self.machine.wait()
            elif chance < 0.88:
                self.machine.limit(self.some_limit())
            elif chance < 0.91:
                self.finish()
            elif chance < 0.97:
                self.interrupt(queue)
            elif chance < 0.98:
                self.reset_queue(queue)
            elif chance > 0.99:
                self.reset()
        self.finish()
        self.check_disk()
        return self.answers + sum(queue.answers for queue in self.queues)

    def close(self) -> None:
        self.is_driving = True
        self.machine.close()
        self.backend.close()

    answers = 0
    """Of queues that are no more."""

    def finish(self) -> None:
        """Everything that was offered is answered, without another notification."""
        self.say("finish")
        for _ in range(100_000):
            self.act(self.machine.turn)
            if not any(queue.waiting for queue in self.queues):
                return
            if not self.machine.wait():
                self.act(self.machine.turn)
                waiting = [len(queue.waiting) for queue in self.queues]
                assert not any(waiting), f"{waiting} requests wait for ever"
        raise AssertionError("no end in sight")

    def ask_one_by_one(self, queue: LegalQueue) -> None:
        """As a program does that waits for each answer."""
        for _ in range(3):
            queue.collect(MAX_SIZE)
            queue.choose_interrupts()
            self.offer(queue, 1)
            self.finish()

    def damage(self) -> None:
        """Some sectors go bad, or are well again."""
        many = self.rng.choice((0, 1, 6))
        starts = range(0, len(self.model.sectors), QUEUE_SECTORS)
        sectors = frozenset(self.rng.choice(starts) + self.rng.randrange(64) for _ in range(many))
        self.say(f"bad sectors: {sorted(sectors)}")
        self.backend.bad = sectors
        self.model.disk = Damage(sectors, False)

    def interrupt(self, queue: LegalQueue) -> None:
        """Something that the driver's requests must not notice."""
        if self.machine.interruptions:
            interruption = self.rng.choice(self.machine.interruptions)
            self.say(f"queue {queue.driver.index}: {interruption.__name__}")
            self.act(lambda: interruption(queue.driver))

    def reset_queue(self, queue: LegalQueue) -> None:
        if not (self.features & Feature.RING_RESET or not self.machine.has_ring_reset):
            return
        index = queue.driver.index
        self.say(f"queue {index}: reset")
        self.act(lambda: self.machine.reset_queue(queue.driver))
        self.answers += queue.answers
        self.queues[index] = self.new_queue(index)
        self.machine.set_up(self.queues[index].driver)

    def reset(self) -> None:
        self.say("device reset")
        self.act(self.machine.reset)
        self.answers += sum(queue.answers for queue in self.queues)
        self.boot()

    def check_disk(self) -> None:
        found = self.path.read_bytes() if isinstance(self.backend, BusyRaw) else self.disk
        if found != b"".join(self.model.sectors):
            wrong = [
                i for i, sector in enumerate(self.model.sectors)
                if found[512 * i : 512 * i + 512] != sector
            ]  # fmt: skip
            raise AssertionError(f"{len(wrong)} sectors are wrong: {wrong[:8]}")


def play(seed: int, folder: Path) -> int:
    """Episode ``seed``; how many requests were answered."""
    episode = Episode(seed, folder)
    try:
        # Both serve passes, and each has its own name for how long one is.
        with (
            mock.patch.object(device, "PASS_BYTES", episode.pass_bytes),
            mock.patch.object(fast_path, "PASS_BYTES", episode.pass_bytes),
        ):
            return episode.play()
    except Exception as error:
        story = "\n".join([episode.setting, *episode.log])
        raise AssertionError(f"PYVMM_SOAK_SEED={seed} fails: {error}\n{story}") from error
    finally:
        episode.close()


def test_fault_1_a_legal_driver_and_the_model_agree(tmp_path: Path) -> None:
    if only := os.environ.get("PYVMM_SOAK_SEED"):
        play(int(only), tmp_path)
        return
    length_s = float(os.environ.get("PYVMM_SOAK_S", "0"))
    # A short run plays the same episodes every time.
    seed = random.SystemRandom().randrange(1 << 40) if length_s else 0
    end_s = time.monotonic() + (length_s or SHORT_S)
    answers = episodes = 0
    while time.monotonic() < end_s or episodes < SHORT_EPISODES:
        answers += play(seed + episodes, tmp_path)
        episodes += 1
    print(f"{episodes} episodes from seed {seed}, {answers} requests")
    assert answers
