"""The rules, one function each. A rule returns None (holds), `Obstacle` (does not run, and why) or `Untold`.

The function's name is the rule's name, which verdicts, rollouts and pages show. Sentences name both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from model_registry.compatibility import tables
from model_registry.compatibility.facts import ArtefactFacts, EngineFacts
from model_registry.compatibility.hardware_key import key_of
from wire.messages import Hardware


@dataclass(frozen=True)
class Obstacle:
    """Why it does not run."""

    sentence: str


@dataclass(frozen=True)
class Untold:
    """The device does not tell the fact that the rule needs."""

    fact: str


Finding: TypeAlias = Obstacle | Untold | None
Rule: TypeAlias = Callable[[ArtefactFacts, Hardware], Finding]


def architecture(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The processor's instruction set."""
    if not facts.architectures:
        return None
    if not device.architecture:
        return Untold("architecture")
    if device.architecture in facts.architectures:
        return None
    return Obstacle(f"is for architecture {', '.join(facts.architectures)}, here is {device.architecture}")


def cpu_features(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Extensions that the kernels are written for."""
    if not facts.cpu_features:
        return None
    if not device.cpu_features:
        return Untold("processor features")
    missing = sorted(set(facts.cpu_features) - set(device.cpu_features))
    if not missing:
        return None
    return Obstacle(f"needs processor features {', '.join(facts.cpu_features)}, here are all but {', '.join(missing)}")


def hardware_key(facts: ArtefactFacts, device: Hardware) -> Finding:
    """An engine for one kind of hardware loads on that kind only; not being told is being another."""
    if facts.hardware_key is None:
        return None
    own = own_key(device)
    if own == facts.hardware_key:
        return None
    return Obstacle(f"was built for hardware key {facts.hardware_key}, here is {own or 'none'}")


def runtime(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The runtime must be installed."""
    if facts.runtime not in tables.RUNTIME_PACKAGES:
        return Obstacle(f"is opened by {facts.runtime}, which no device runs")
    if not device.runtimes:
        return Untold("runtimes")
    if _installed(facts.runtime, device) is not None:
        return None
    return Obstacle(f"needs {facts.runtime}, here are {', '.join(sorted(device.runtimes))}")


def runtime_version(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The lowest version that loads it."""
    installed = _installed(facts.runtime, device)
    if facts.runtime_version is None or installed is None:
        return None
    if numbers(installed) >= numbers(facts.runtime_version):
        return None
    return Obstacle(f"needs {facts.runtime} version {facts.runtime_version}, here is {installed}")


def provider(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Made for an execution provider: on another it is refused or crawls. Not told to be there is not there."""
    if not facts.providers or set(facts.providers) & set(_providers(device)):
        return None
    return Obstacle(f"needs {' or '.join(facts.providers)}, here are {', '.join(_providers(device))}")


def operator_set(facts: ArtefactFacts, device: Hardware) -> Finding:
    """ONNX Runtime reads IR versions and operator sets up to those of its own release."""
    if not _opens_onnx(facts) or (facts.ir_version is None and not facts.opsets):
        return None
    version = _onnxruntime(device)
    if version is None:
        return Untold("version of onnxruntime")
    newest_opset, newest_ir = _newest_read(version)
    if (facts.ir_version or 0) > newest_ir:
        return Obstacle(f"is ONNX IR version {facts.ir_version}, onnxruntime {version} reads up to {newest_ir}")
    for domain, opset in sorted(facts.opsets.items()):
        known = newest_opset if domain in ("", "ai.onnx") else _newest_of(domain, version)
        if known is not None and opset > known:
            return Obstacle(
                f"uses operator set {opset} of {domain or 'ai.onnx'}, onnxruntime {version} reads up to {known}"
            )
    return None


def contrib_operator(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Operators outside ONNX exist in some execution providers only, from some version on."""
    if not facts.operators or not _opens_onnx(facts):
        return None
    version = _onnxruntime(device)
    if version is None:
        return Untold("version of onnxruntime")
    here = _providers(device)
    for operator in facts.operators:
        known = tables.CONTRIB_OPERATORS.get(operator)
        if known is None:
            return Obstacle(f"uses operator {operator}, which no runtime here is known to implement")
        if not any(name in here and numbers(version)[:2] >= since for name, since in known.items()):
            places = ", ".join(f"{name} from {since[0]}.{since[1]}" for name, since in known.items())
            return Obstacle(
                f"uses operator {operator}, which exists in {places}; here are {', '.join(here)} of {version}"
            )
    return None


def number_format(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Formats that only some hardware computes with."""
    if not facts.formats & set(tables.FORMAT_CAPABILITIES):
        return None
    is_on_gpu = facts.engine is not None or bool(facts.providers and tables.CPU not in facts.providers)
    for one in sorted(facts.formats):
        if is_on_gpu:
            problem = _format_obstacle(one, device.compute_capability)
        else:
            problem = f"computes in {one}, which no CPU kernel does" if one in ("bf16", "fp4") else None
        if problem is not None:
            return Obstacle(problem)
    return None


def driver(facts: ArtefactFacts, device: Hardware) -> Finding:
    """What is built against CUDA 13 needs a driver of its time."""
    is_on_gpu = facts.engine is not None or bool(facts.providers and tables.CPU not in facts.providers)
    for name, since in tables.CUDA13_RUNTIMES.items():
        wanted = facts.runtime == name or name in tables.RUNTIME_PACKAGES.get(facts.runtime, ())
        installed = device.runtimes.get(name)
        if not (is_on_gpu and wanted and installed and numbers(installed)[:2] >= since):
            continue
        if device.driver is None:
            return Untold("driver version")
        if (numbers(device.driver) or (0,))[0] < tables.CUDA13_MIN_DRIVER:
            return Obstacle(f"needs driver {tables.CUDA13_MIN_DRIVER} for {name} {installed}, here is {device.driver}")
    return None


def engine_runtime(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The very runtime that built the engine, in the very version; lean runtimes take version-compatible ones only."""
    engine = facts.engine
    if engine is None:
        return None
    installed = device.runtimes.get(engine.builder)
    lean = device.runtimes.get("tensorrt-lean") if engine.builder == "tensorrt" else None
    if installed is None and (lean is None or not engine.is_version_compatible):
        what = "an engine that is not version-compatible" if lean else f"an engine of {engine.builder}"
        return Obstacle(f"is {what}, here are {', '.join(sorted(device.runtimes)) or 'no runtimes'}")
    version = installed or lean or ""
    if numbers(version) == numbers(engine.version):
        return None
    if engine.is_version_compatible and numbers(engine.version) < numbers(version):
        return None
    return Obstacle(f"was built by {engine.builder} {engine.version}, here is {version}: engines load in no other")


def engine_capability(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The engine holds kernels for the compute capabilities it names, and its runtime must serve this one at all."""
    engine, here = facts.engine, device.compute_capability
    if engine is None:
        return None
    if here is None:
        return Obstacle(f"is an engine for compute capability {_listed(engine)}, the device tells none")
    served = capability_obstacle(engine.builder, engine.version, here)
    if served is not None:
        return Obstacle(served)
    if here in engine.compute_capabilities:
        return None
    return Obstacle(f"is an engine for compute capability {_listed(engine)}, here is {here}")


def engine_jetpack(facts: ArtefactFacts, device: Hardware) -> Finding:
    """On Jetson an engine belongs to the JetPack it was built under, and so does TensorRT."""
    engine = facts.engine
    if engine is None:
        return None
    is_jetson = device.compute_capability in tables.JETPACK_CAPABILITIES or device.jetpack is not None
    if not is_jetson and engine.jetpack is None:
        return None
    if device.jetpack is None:
        return Obstacle("is an engine for a Jetson, and the device tells no JetPack")
    if engine.jetpack != device.jetpack:
        return Obstacle(f"was built under JetPack {engine.jetpack or 'none'}, here is {device.jetpack}: build it anew")
    return _jetpack_obstacle(device)


def engine_architecture(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Engines of classic TensorRT are for one processor architecture."""
    engine = facts.engine
    if engine is None or engine.architecture is None or engine.architecture == device.architecture:
        return None
    return Obstacle(f"is an engine for {engine.architecture}, here is {device.architecture or 'not told'}")


def memory_budget(facts: ArtefactFacts, device: Hardware) -> Finding:
    """What the device may use, not what it has."""
    budget = device.memory_budget_bytes
    if not facts.memory_bytes:
        return None
    if not budget:
        return Untold("memory budget")
    if facts.memory_bytes <= budget:
        return None
    return Obstacle(f"needs {_mib(facts.memory_bytes)} of memory, the budget is {_mib(budget)}")


def disk_space(facts: ArtefactFacts, device: Hardware) -> Finding:
    """Free disk by the last report."""
    if not facts.disk_bytes:
        return None
    if not device.disk_free_bytes:
        return Untold("free disk")
    if facts.disk_bytes <= device.disk_free_bytes:
        return None
    return Obstacle(f"needs {_mib(facts.disk_bytes)} of disk, {_mib(device.disk_free_bytes)} are free")


RULES: Sequence[Rule] = (
    architecture,
    cpu_features,
    hardware_key,
    runtime,
    runtime_version,
    provider,
    operator_set,
    contrib_operator,
    number_format,
    driver,
    engine_runtime,
    engine_capability,
    engine_jetpack,
    engine_architecture,
    memory_budget,
    disk_space,
)


def parser_operators(facts: ArtefactFacts, device: Hardware) -> Finding:
    """TensorRT's parsers read ONNX's own operators, up to an operator set, without a quantised bias."""
    key = key_of(device)
    if key is None:
        return Obstacle("no engine can be built: the device tells no runtime and compute capability for one")
    if facts.runtime != "onnxruntime":
        return Obstacle(f"is opened by {facts.runtime}: {key.builder} reads plain ONNX only")
    if facts.declines_engines:
        return Obstacle("has no engine built for it: its recipe names onnxruntime")
    if facts.operators:
        return Obstacle(f"uses operator {facts.operators[0]}, which {key.builder} does not read")
    if "int32_bias" in facts.formats:
        return Obstacle(f"has quantised biases, which {key.builder} does not read")
    if not facts.opsets:
        return Obstacle("does not tell its operator sets: compile it again")
    newest = tables.PARSER_OPSETS.get((key.builder, (numbers(key.version) or (0,))[0]), 0)
    opset = facts.opsets.get("ai.onnx", facts.opsets.get("", 0))
    if opset > newest:
        return Obstacle(f"uses operator set {opset}, {key.builder} {key.version} reads up to {newest}")
    return None


def builder_capability(facts: ArtefactFacts, device: Hardware) -> Finding:
    """The builder must serve the compute capability, and the capability the graph's numbers."""
    key = key_of(device)
    if key is None:
        return None
    problem = capability_obstacle(key.builder, key.version, key.compute_capability)
    if problem is not None:
        return Obstacle(problem)
    for one in sorted(facts.formats):
        problem = _format_obstacle(one, key.compute_capability)
        if problem is not None:
            return Obstacle(problem)
    if key.compute_capability in tables.JETPACK_CAPABILITIES:
        return _jetpack_obstacle(device)
    return None


BUILD_RULES: Sequence[Rule] = (architecture, parser_operators, builder_capability)


def capability_obstacle(builder: str, version: str, capability: str) -> str | None:
    """Why the runtime does not serve a compute capability; None when it does."""
    if builder == "tensorrt-rtx":
        if capability in (*tables.RTX_CAPABILITIES, *tables.RTX_OWN_ENGINE):
            return None
        served = ", ".join(tables.RTX_CAPABILITIES)
        return f"is for TensorRT-RTX, which refuses compute capability {capability}: it serves {served}"
    known = tables.TENSORRT_CAPABILITIES.get((numbers(version) or (0,))[0], ())
    if capability in known:
        return None
    return f"is for TensorRT {version}, which has no kernels for compute capability {capability}"


def own_key(device: Hardware) -> str | None:
    """The hardware key of a device as text: what its facts make, else what its profile states."""
    key = key_of(device)
    return str(key) if key is not None else device.hardware_key


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison."""
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _jetpack_obstacle(device: Hardware) -> Finding:
    if device.jetpack is None:
        return Obstacle("is for a Jetson, and the device tells no JetPack")
    shipped = tables.JETPACK_TENSORRT.get(".".join(device.jetpack.split(".")[:2]))
    installed = device.runtimes.get("tensorrt", "none")
    if shipped is not None and numbers(installed)[: len(numbers(shipped))] == numbers(shipped):
        return None
    if shipped is None:
        return Obstacle(f"JetPack {device.jetpack} is not known: no rule says which TensorRT it ships")
    return Obstacle(f"JetPack {device.jetpack} ships TensorRT {shipped}, the device says {installed}")


def _format_obstacle(number: str, capability: str | None) -> str | None:
    limits = tables.FORMAT_CAPABILITIES.get(number)
    if limits is None:
        return None
    if capability is None:
        return f"computes in {number}, and the device tells no compute capability"
    if limits[0] <= float(capability) <= limits[1] and (number, capability) not in tables.FORMAT_EXCEPTIONS:
        return None
    span = f"{limits[0]:g}" if limits[1] < limits[0] + 1 else f"{limits[0]:g} on"
    return f"computes in {number}, which takes compute capability {span}, here is {capability}"


def _newest_read(version: str) -> tuple[int, int]:
    """Operator set and IR version of the newest known release that is not newer than `version`."""
    known = [row for since, row in tables.ONNXRUNTIME_READS.items() if since <= numbers(version)[:2]]
    return known[-1] if known else (0, 0)


def _newest_of(domain: str, version: str) -> int | None:
    """The newest operator set of another domain that `version` reads; None for domains that it does not bring along."""
    rows = tables.OTHER_DOMAINS.get(domain)
    if rows is None:
        return None
    return max((newest for since, newest in rows.items() if since <= numbers(version)[:2]), default=0)


def _providers(device: Hardware) -> tuple[str, ...]:
    told = device.providers or []
    return tuple(dict.fromkeys([*told, tables.CPU]))


def _opens_onnx(facts: ArtefactFacts) -> bool:
    return facts.runtime in ("onnxruntime", "onnxruntime-genai")


def _installed(runtime_name: str, device: Hardware) -> str | None:
    packages = tables.RUNTIME_PACKAGES.get(runtime_name, ())
    return next((device.runtimes[name] for name in packages if name in device.runtimes), None)


def _onnxruntime(device: Hardware) -> str | None:
    return _installed("onnxruntime", device)


def _listed(engine: EngineFacts) -> str:
    return ", ".join(engine.compute_capabilities)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"
