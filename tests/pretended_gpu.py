"""GPUs that there are not: code for CUDA runs on the CPU, and what CUDA would refuse is refused.

    with PretendedGPU() as gpu:
        network.to("cuda")             computed on the CPU; `.device` says cuda:0
        gpu.syncs                      where the host waited for the device, how often
        gpu.up, gpu.down               bytes to the device and back

Every storage has a label, "cpu" or "cuda:k"; what an operation makes has the label of what it read.

    Refused   what CUDA answers with an error: tensors of two devices in one operation, `numpy()` of
              a GPU's tensor, pinning it, a sum of gloo over it, pickling it, a CPU's generator,
              an LSTM's state in another order
    Race      what CUDA does wrong without a word: a pinned buffer written to while its copy is on
              the way, or read (by PyTorch) before its copy is there; a tensor used on a stream that
              does not wait for the one on which it was made

A copy to the host that is not waited for fills its target when somebody waits for its stream, a
later event or the device: until then the target holds NaN.

What it cannot tell: how CUDA rounds; how long anything takes; what another process does; memory
that goes back to PyTorch's allocator while another stream uses it; what cuDNN, NCCL and
`torch.compile` do in CUDA's place. Operations inside one call of PyTorch are not asked where they
make scratch memory. A real GPU has the last word: `pytest -m cuda`.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
Clock = dict[int, int]
"""Stream → how many of its operations are known to be done."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero"}
"""Operations whose result the host needs: its size, or itself."""


class Refused(RuntimeError):
    """CUDA would raise an error here."""


class Race(AssertionError):
    """CUDA would go on here, with wrong numbers now and then."""


class Label:
    """What is known of a storage that is on a GPU, or pinned."""

    def __init__(self, storage: Any, device: torch.device, pinned: bool = False) -> None:
        self.kept, self.device, self.pinned = StorageWeakRef(storage), device, pinned
        self.written: tuple[int, int] | None = None
        """Stream and number of the last operation that wrote."""
        self.reads: Clock = {}
        """Stream → number of its last operation that read."""
        self.awaited = False
        """A copy to it is on the way."""
        self.going: list[tuple[int, int, Callable[[], None]]] = []
        """Copies from it that are on the way: stream, number, what looks at them."""


class PretendedStream:
    """Operations in their order. Made as `torch.cuda.Stream` is."""

    gpu: "PretendedGPU"

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = self.gpu.place(device, "cuda"), priority
        self.number = self.cuda_stream = len(self.gpu.streams)
        self.clock: Clock = {self.number: 0}
        self.under_way: list[tuple[int, Callable[[], None]]] = []
        """Copies: number, and what is done when the host knows that they are over."""
        self.gpu.streams.append(self)

    def launch(self) -> int:
        """One operation more; its number."""
        join(self.clock, self.gpu.known)
        self.clock[self.number] += 1
        return self.clock[self.number]

    def synchronize(self) -> None:
        """The host waits."""
        self.gpu.wait_for(self.clock, "stream.synchronize")

    def wait_stream(self, other: "PretendedStream") -> None:
        """What comes here now comes after what is there."""
        join(self.clock, other.clock)

    def wait_event(self, event: "PretendedEvent") -> None:
        """What comes here now comes after the event."""
        join(self.clock, event.clock)

    def record_event(self, event: "PretendedEvent | None" = None) -> "PretendedEvent":
        """An event after all that is here."""
        event = event or PretendedEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all is done; nobody waits."""
        return self.gpu.knows(self.clock)


class PretendedEvent:
    """A moment of a stream. Made as `torch.cuda.Event` is."""

    gpu: "PretendedGPU"

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: PretendedStream | None = None) -> None:
        """After all that is on the stream."""
        self.clock = dict((stream or self.gpu.current_stream()).clock)

    def wait(self, stream: PretendedStream | None = None) -> None:
        """What comes to the stream now comes after this."""
        (stream or self.gpu.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        self.gpu.wait_for(self.clock, "event.synchronize")

    def query(self) -> bool:
        """Whether it is over; nobody waits."""
        return self.gpu.knows(self.clock)

    def elapsed_time(self, other: "PretendedEvent") -> float:
        """Milliseconds; of no meaning here."""
        return 1.0


def join(clock: Clock, other: Clock) -> None:
    """What either knows."""
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


class Here(threading.local):
    """What each thread has for itself."""

    def __init__(self, streams: list[PretendedStream]) -> None:
        self.streams = list(streams)
        """The current one of each device."""
        self.current = 0
        """Device."""
        self.off = 0
        self.number_set = False
        """A plain number is being written by `x[…] = number`: CUDA needs no copy of it."""
        self.made_on: list[torch.device] = [CPU]
        """Where PyTorch makes things within a call."""


class PretendedGPU:
    """So many GPUs in this thread and in those that begin meanwhile, within a `with`."""

    def __init__(self, count: int = 1) -> None:
        self.number_of_gpus = count
        self.labels: dict[int, Label] = {}
        self.known: Clock = {}
        """What the host knows to be done."""
        self.streams: list[PretendedStream] = []
        self.here: Here
        """Of the thread that asks."""
        self.lock = threading.RLock()
        self.syncs: Counter[str] = Counter()
        """Place in our code, and what waited there → how often."""
        self.up = self.down = 0
        """Bytes to devices, and from them."""
        self._exits = ExitStack()

    # -- the world -----------------------------------------------------------------------------

    def __enter__(self) -> "PretendedGPU":
        stack = self._exits
        stream = type("Stream", (PretendedStream,), {"gpu": self})
        self.event = type("Event", (PretendedEvent,), {"gpu": self})
        # The first ones do not ask where they are made.
        self.here = Here([])
        self.here = Here([stream(k) for k in range(self.number_of_gpus)])
        names: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self.number_of_gpus,
            "current_device": lambda: self.here.current,
            "set_device": self.set_device,
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self.streams[self.place(device, "cuda").index],
            "stream": self.on_stream,
            "Stream": stream,
            "Event": self.event,
            "synchronize": self.synchronize,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": self.properties,
            "is_bf16_supported": lambda *_: True,
            "is_current_stream_capturing": lambda: False,
            "mem_get_info": lambda device=None: (2**36, 2**37),
        }
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
            names[name] = lambda device=None: 2**20
        for name in ("empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
            names[name] = lambda *_: None
        for name, value in names.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        real = torch.autocast

        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return real("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        stack.enter_context(patch.object(torch, "autocast", autocast))
        acceptable = patch.object(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
        stack.enter_context(acceptable)
        for kind, name in ((Tensor, "_reduce_ex_internal"), (nn.Parameter, "__reduce_ex__")):
            stack.enter_context(patch.object(kind, name, self._kept_here(getattr(kind, name))))
        run = threading.Thread.run

        def seen(thread: threading.Thread) -> None:
            with Operations(self), Calls(self):
                run(thread)

        stack.enter_context(patch.object(threading.Thread, "run", seen))
        stack.enter_context(Operations(self))
        stack.enter_context(Calls(self))
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._exits.close()
        if kind is None:
            for stream in self.streams:
                self.learn(stream.clock)

    def _kept_here(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        """Pickles tensors of the host: one of a GPU cannot be read where there is none."""

        def asked(one: Tensor, protocol: int) -> Any:
            if self.where(one) != CPU:
                raise Refused(f"a tensor on {self.where(one)} goes to another process")
            return reduce(one, protocol)

        return asked

    def place(self, device: Any, without: str = "cpu") -> torch.device:
        """A device with its number."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        found = torch.device(without if device is None else device)
        if found.type == "cuda":
            found = torch.device("cuda", self.here.current if found.index is None else found.index)
            if found.index >= self.number_of_gpus:
                raise Refused(f"CUDA error: invalid device ordinal: {found}")
            return found
        return CPU

    def set_device(self, device: Any) -> None:
        """As `torch.cuda.set_device`."""
        self.here.current = self.place(device, "cuda").index

    def current_stream(self, device: Any = None) -> PretendedStream:
        """Of a device."""
        return self.here.streams[self.place(device, "cuda").index]

    @contextmanager
    def on_stream(self, stream: PretendedStream | None) -> Iterator[None]:
        """Within, operations of its device go to this stream."""
        if stream is None:
            yield
            return
        before = self.here.current, self.here.streams[stream.device.index]
        self.here.current, self.here.streams[stream.device.index] = stream.device.index, stream
        yield
        self.here.current, self.here.streams[stream.device.index] = before

    def synchronize(self, device: Any = None) -> None:
        """The host waits for all streams of a device."""
        where = self.place(device, "cuda")
        whole: Clock = {}
        for stream in self.streams:
            if stream.device == where:
                join(whole, stream.clock)
        self.wait_for(whole, "torch.cuda.synchronize")

    def properties(self, device: Any = None) -> SimpleNamespace:
        """As far as anybody asks."""
        uuid = f"GPU-{self.place(device, 'cuda').index}"
        return SimpleNamespace(uuid=uuid, name="pretended GPU", total_memory=2**37, major=9)

    # -- labels --------------------------------------------------------------------------------

    def label(self, tensor: Tensor) -> Label | None:
        """Of its storage; None for a plain one of the host."""
        return self.labels.get(tensor.untyped_storage()._cdata) if self.labels else None

    def where(self, tensor: Tensor) -> torch.device:
        """Its device."""
        found = self.label(tensor)
        return CPU if found is None else found.device

    def put(self, tensor: Tensor, device: torch.device, pinned: bool = False) -> Tensor:
        """Its storage is there from now on."""
        storage = tensor.untyped_storage()
        if device == CPU and not pinned:
            self.labels.pop(storage._cdata, None)
        else:
            # A number is not given to another storage as long as a weak reference is kept.
            with self.lock:
                self.labels[storage._cdata] = Label(storage, device, pinned)
                if len(self.labels) % 500 == 0:
                    self.labels = {k: v for k, v in self.labels.items() if not v.kept.expired()}
        return tensor

    # -- time ----------------------------------------------------------------------------------

    def knows(self, clock: Clock) -> bool:
        """Whether the host knows already that all of this is over."""
        return all(number <= self.known.get(one, 0) for one, number in clock.items())

    def wait_for(self, clock: Clock, what: str) -> None:
        """The host waits, unless it knows already."""
        if not self.knows(clock):
            self.count(what)
            self.learn(clock)

    def learn(self, clock: Clock) -> None:
        """The host knows that all of this is over."""
        with self.lock:
            join(self.known, clock)
            for stream in self.streams:
                end = self.known.get(stream.number, 0)
                while stream.under_way and stream.under_way[0][0] <= end:
                    stream.under_way.pop(0)[1]()

    def wait(self, what: str, device: torch.device) -> None:
        """The host waits for the current stream."""
        self.count(what)
        self.learn(self.current_stream(device).clock)

    def count(self, what: str) -> None:
        """A wait, by the line of ours that led to it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
            if ours and path != Path(__file__).resolve():
                name = f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
                self.syncs[f"{name}: {what}"] += 1
                return
            frame = frame.f_back
        self.syncs[what] += 1

    def use(self, found: Label, stream: PretendedStream, number: int, write: bool) -> None:
        """An operation of a stream reads or writes a GPU's storage."""
        others = dict([found.written] if found.written else [])
        if write:
            join(others, found.reads)
        for other, when in others.items():
            if stream.clock.get(other, 0) < when:
                doing = "written" if write else "read"
                raise Race(f"{doing} on stream {stream.number}, which does not wait for {other}")
        if write:
            found.written, found.reads = (stream.number, number), {}
        else:
            found.reads[stream.number] = number

    def launched(self, written: list[Tensor], device: torch.device) -> None:
        """A kernel that writes these and reads nothing."""
        stream = self.current_stream(device)
        number = stream.launch()
        for one in written:
            if (found := self.label(one)) is not None:
                self.use(found, stream, number, write=True)

    # -- copies --------------------------------------------------------------------------------

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """`target.copy_(source)` between devices."""
        to, of = self.label(target), self.label(source)
        to_device, of_device = self.where(target), self.where(source)
        device = of_device if to_device == CPU else to_device
        stream = self.current_stream(device)
        if CPU not in (to_device, of_device):  # each waits for the other
            other = self.current_stream(of_device)
            join(stream.clock, other.clock)
            join(other.clock, {stream.number: stream.clock[stream.number] + 1})
        number, beside = stream.launch(), False
        for found, write in ((of, False), (to, True)):
            if found is not None and found.device != CPU:
                self.use(found, stream, number, write)
        if to_device == CPU:
            self.down += target.nbytes
            beside = non_blocking and to is not None and to.pinned
            if beside:
                assert to is not None
                self._arrives_later(target, source, to, stream, number)
                return
        elif of_device == CPU:
            self.up += target.nbytes
            beside = non_blocking and of is not None and of.pinned
            if of is not None and of.awaited and not self._follows(source, stream):
                raise Race("a pinned buffer goes to the device before its own copy is there")
        target.copy_(source)
        if beside:
            assert of is not None
            check = self._still(source)
            of.going.append((stream.number, number, check))
            stream.under_way.append((number, check))
        elif CPU in (to_device, of_device):
            self.wait("copy to the host" if to_device == CPU else "copy to the device", device)

    def _arrives_later(
        self, target: Tensor, source: Tensor, to: Label, stream: PretendedStream, number: int
    ) -> None:
        for other, when, check in to.going:
            if stream.clock.get(other, 0) >= when:
                check()
        values, to.awaited = source.to(target.dtype, copy=True), True
        if target.dtype.is_floating_point:
            target.fill_(float("nan"))
        else:
            target.copy_(~values if target.dtype == torch.bool else values + 77)

        def arrive() -> None:
            with self.raw(), torch.inference_mode():
                target.copy_(values)
            to.awaited = False

        stream.under_way.append((number, arrive))
        to.written = stream.number, number

    def _still(self, source: Tensor) -> Callable[[], None]:
        """What finds out that nobody wrote to a buffer meanwhile."""
        flown = [source.clone()]

        def check() -> None:
            with self.raw(), torch.inference_mode():
                if flown and not torch.equal(_bytes(source), _bytes(flown.pop())):
                    raise Race("a pinned buffer was written to while its copy was on the way")

        return check

    def _follows(self, source: Tensor, stream: PretendedStream) -> bool:
        found = self.label(source)
        assert found is not None and found.written is not None
        return stream.clock.get(found.written[0], 0) >= found.written[1]

    def moved(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        """A copy on another device, as `Tensor.to` makes it."""
        pinned = non_blocking and device == CPU
        with self.raw():
            made = self.put(torch.empty_like(tensor.detach()), device, pinned)
            self.copy(made, tensor.detach(), non_blocking)
        return made

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Within, all is as if there were no such GPU."""
        self.here.off += 1
        try:
            yield
        finally:
            self.here.off -= 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Moved(torch.autograd.Function):
    """`Tensor.to` between devices, for autograd."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: PretendedGPU, device: Any, later: bool) -> Tensor:
        """There."""
        ctx.gpu, ctx.device = gpu, gpu.where(tensor)
        return gpu.moved(tensor, device, later)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """And back."""
        return ctx.gpu.moved(gradient, ctx.device), None, None, None


class Kind:
    """What is to be known of an operation of ATen."""

    def __init__(self, func: Any) -> None:
        self.name = func._schema.name.partition("::")[2]
        self.namespace = func.namespace
        arguments, returns = func._schema.arguments, func._schema.returns
        self.writes = [
            (index, one.name)
            for index, one in enumerate(arguments)
            if one.alias_info is not None and one.alias_info.is_write
        ]
        alias = [one.alias_info for one in returns if one.alias_info is not None]
        self.is_view = any(not one.is_write for one in alias)
        self.scalars = torch.Tag.pointwise in func.tags or self.name.rstrip("_") in POINTWISE


POINTWISE = {"add", "sub", "mul", "div", "where", "fill", "lerp", "addcmul", "addcdiv", "pow"}
POINTWISE |= {"clamp", "maximum", "minimum", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge"}
"""Operations that take a number from the host's memory, if PyTorch does not tell."""
kind_of = cache(Kind)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """In arguments, also within lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class Operations(TorchDispatchMode):
    """Sees every operation, those of a backward pass too."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        if gpu.here.off:
            return func(*args, **kwargs)
        with gpu.raw():
            inputs = list(tensors_in((*args, *kwargs.values())))
            labels = [gpu.label(one) for one in inputs]
            if not any(labels):
                made = func(*args, **kwargs)
                if not inputs and gpu.here.made_on[-1] != CPU:
                    for one in tensors_in([made]):
                        gpu.put(one, gpu.here.made_on[-1])
                return made
            return self._done(func, args, kwargs, inputs, labels)

    def _done(self, func: Any, args: Any, kwargs: Any, inputs: Any, labels: Any) -> Any:
        gpu, kind = self.gpu, kind_of(func)
        if kind.name == "copy_":
            target, source, *later = args
            if gpu.where(target) != gpu.where(source):
                if gpu.here.number_set and source.ndim == 0 and gpu.label(source) is None:
                    return self._filled(target, source)
                gpu.copy(target, source, bool(later[0] if later else kwargs.get("non_blocking")))
                return target
        if not kind.is_view:
            for found in labels:
                if found is not None and found.awaited and found.device == CPU:
                    raise Race(f"{kind.name} reads a pinned buffer before its copy is there")
        device = self._device(kind, args, kwargs, inputs, labels)
        made = func(*args, **kwargs)
        for one in tensors_in([made]):
            if device != CPU and not any(one.is_set_to(given) for given in inputs):
                storage = one.untyped_storage()._cdata
                if all(storage != given.untyped_storage()._cdata for given in inputs):
                    gpu.put(one, device)
        if device != CPU and not kind.is_view:
            self._ran(kind, args, kwargs, inputs, made, device)
        return made

    def _filled(self, target: Tensor, source: Tensor) -> Tensor:
        """`x[index] = number`: CUDA makes the number where it is needed."""
        self.gpu.launched([target], self.gpu.where(target))
        return target.copy_(source)

    def _device(
        self, kind: Kind, args: Any, kwargs: Any, inputs: list[Tensor], labels: Any
    ) -> torch.device:
        """Of all that an operation reads; Refused if there are two."""
        places = [CPU if found is None else found.device for found in labels]
        if kind.namespace == "c10d" and any(place != CPU for place in places):
            raise Refused("a sum of gloo over a GPU's tensor: it must go through the host")
        device = next((place for place in places if place != CPU), CPU)
        first = self.gpu.where(args[0]) if isinstance(args[0], Tensor) else CPU
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in kind.writes]
        for one, place in zip(inputs, places, strict=True):
            if place == device:
                continue
            wrapped = kind.scalars and one.ndim == 0 and place == CPU
            if wrapped and not any(one is other for other in tensors_in(written)):
                continue
            if kind.name in INDEXING and first == device and one is not args[0]:
                value = args[2] if len(args) > 2 else None
                if one is value and one.ndim == 0 and self.gpu.here.number_set:
                    continue
                if one is not value or one.ndim == 0:
                    self.gpu.up += one.nbytes
                    self.gpu.wait("index from the host", device)
                    continue
            raise Refused(f"{kind.name}: expected all tensors on one device, found {set(places)}")
        return device

    def _ran(
        self, kind: Kind, args: Any, kwargs: Any, inputs: Any, made: Any, device: torch.device
    ) -> None:
        """A kernel: its place among others, and whether the host waits for it."""
        gpu = self.gpu
        if kind.name.startswith(("empty", "new_empty")):
            return
        stream = gpu.current_stream(device)
        number = stream.launch()
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in kind.writes]
        for values, write in ((inputs, False), (list(tensors_in([*written, made])), True)):
            for one in values:
                if (found := gpu.label(one)) is not None and found.device != CPU:
                    gpu.use(found, stream, number, write)
        if kwargs.get("generator") is not None:
            raise Refused("expected a 'cuda' device type for the generator, but found 'cpu'")
        masks = kind.name in INDEXING and any(
            one.dtype in (torch.bool, torch.uint8) for one in tensors_in([args[1]])
        )
        if kind.name == "_local_scalar_dense":
            gpu.down += inputs[0].nbytes
            gpu.wait("number", device)
        elif kind.name in WAITING or masks:
            gpu.wait("mask" if masks else kind.name, device)


class Calls(TorchFunctionMode):
    """Sees every call of PyTorch: what they ask of devices, and what is said of them."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu
        kind: Any = Tensor
        self.own: dict[Any, Callable[..., Any]] = {
            kind.device.__get__: gpu.where,
            kind.is_cuda.__get__: lambda one: gpu.where(one) != CPU,
            kind.is_cpu.__get__: lambda one: gpu.where(one) == CPU,
            Tensor.get_device: lambda one: -1 if (w := gpu.where(one)) == CPU else w.index,
            Tensor.is_pinned: lambda one, *_: (
                (found := gpu.label(one)) is not None and found.pinned
            ),
            kind.grad.__set__: self.set_grad,
            Tensor.to: self.to,
            Tensor.cpu: lambda one, **kwargs: self.to(one, CPU, **kwargs),
            Tensor.cuda: lambda one, device=None, non_blocking=False, **kwargs: self.to(
                one, gpu.place(device, "cuda"), non_blocking=non_blocking, **kwargs
            ),
            Tensor.pin_memory: self.pin_memory,
            Tensor.tolist: self.tolist,
            Tensor.record_stream: lambda one, stream: None,
            Tensor.__deepcopy__: self.deepcopy,
            Tensor.__setitem__: self.set_item,
            torch.as_tensor: self.as_tensor,
        }
        for name in ("numpy", "__array__", "__dlpack__", "share_memory_"):
            call = getattr(Tensor, name)
            self.own[call] = self.refused(name, call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        if gpu.here.off:
            return func(*args, **kwargs)
        if (own := self.own.get(func)) is not None:
            return own(*args, **kwargs)
        if kwargs.get("device") is not None or kwargs.get("pin_memory"):
            return self.make(func, args, kwargs)
        found = CPU
        if gpu.labels:
            places = map(gpu.where, tensors_in((*args, *kwargs.values())))
            found = next((place for place in places if place != CPU), CPU)
        if found != CPU and getattr(func, "__name__", "") == "lstm":
            if not all(part.is_contiguous() for part in args[1]):
                raise Refused("rnn: hx is not contiguous")
        return self.within(found, func, args, kwargs)

    def within(self, device: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that makes what it makes there."""
        self.gpu.here.made_on.append(device)
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.here.made_on.pop()

    def make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor somewhere."""
        kwargs, gpu = dict(kwargs), self.gpu
        device, pinned = gpu.place(kwargs.pop("device", None)), kwargs.pop("pin_memory", False)
        if pinned and device != CPU:
            raise Refused("only dense CPU tensors can be pinned")
        if kwargs.get("generator") is not None and device != CPU:
            raise Refused("expected a 'cuda' device type for the generator, but found 'cpu'")
        made = self.within(CPU, func, args, kwargs)
        for one in tensors_in([made]):
            gpu.put(one, device, pinned)
            if device != CPU and "empty" not in func.__name__:
                gpu.launched([one], device)
            if func is torch.tensor and device != CPU:
                gpu.up += one.nbytes
                gpu.wait("copy to the device", device)
        return made

    def to(self, one: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tensor.to`."""
        gpu, other = self.gpu, kwargs.pop("other", None)
        if args and isinstance(args[0], Tensor):
            other, args = args[0], args[1:]
        copy = kwargs.pop("copy", False)
        kwargs.pop("memory_format", None)
        if other is not None:
            kwargs["device"], kwargs["dtype"] = gpu.where(other), other.dtype
        device, dtype, later, _ = torch._C._nn._parse_to(*args, **kwargs)
        target = gpu.where(one) if device is None else gpu.place(device)
        if target == gpu.where(one):
            return self.within(target, one.to, (dtype or one.dtype,), {"copy": copy})
        if one.requires_grad and torch.is_grad_enabled():
            made = Moved.apply(one, gpu, target, later)
        else:
            made = gpu.moved(one, target, later)
        return made if dtype in (None, one.dtype) else self.within(target, made.to, (dtype,), {})

    def as_tensor(self, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        """As `torch.as_tensor`."""
        made = torch.as_tensor(data, dtype=dtype)
        return made if device is None else self.to(made, device)

    def pin_memory(self, one: Tensor, *_: Any) -> Tensor:
        """A pinned copy."""
        found = self.gpu.label(one)
        if found is not None and found.device != CPU:
            raise Refused("cannot pin 'torch.cuda.FloatTensor': only CPU tensors can be pinned")
        if found is not None and found.pinned:
            return one
        return self.gpu.put(one.detach().clone(), CPU, pinned=True)

    def tolist(self, one: Tensor) -> Any:
        """Waits."""
        if (device := self.gpu.where(one)) != CPU:
            self.gpu.down += one.nbytes
            self.gpu.wait("tolist", device)
        with self.gpu.raw():
            return one.tolist()

    def set_grad(self, one: Tensor, gradient: Tensor | None) -> None:
        """Refused if it is elsewhere."""
        if gradient is not None and self.gpu.where(gradient) != self.gpu.where(one):
            raise Refused("assigned grad has data located on a different device")
        kind: Any = Tensor
        kind.grad.__set__(one, gradient)

    def set_item(self, one: Tensor, index: Any, value: Any) -> None:
        """As `x[index] = value`."""
        self.gpu.here.number_set = not isinstance(value, Tensor)
        try:
            self.within(self.gpu.where(one), one.__setitem__, (index, value), {})
        finally:
            self.gpu.here.number_set = False

    def deepcopy(self, one: Tensor, memo: Any) -> Tensor:
        """Where the original is."""
        made = one.__deepcopy__(memo)
        if self.gpu.where(one) != self.gpu.where(made):
            self.gpu.put(made, self.gpu.where(one))
        return made

    def refused(self, name: str, call: Any) -> Callable[..., Any]:
        """What only a tensor of the host can do."""

        def asked(one: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (device := self.gpu.where(one)) != CPU:
                raise Refused(f"can't do {name}() of a tensor on {device}: call cpu() first")
            return call(one, *args, **kwargs)

        return asked
