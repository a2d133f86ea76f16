"""Codes of a failed proof that speak against the engine itself; any other speaks of the device or the way to it."""

ENGINE_FAULTS = frozenset({
    "corrupt_engine", "crashed", "engine_failed", "engine_refused", "inaccurate", "integrity", "load_failed",
    "not_finite", "probe_failed", "refused", "unsuitable_hardware", "wrong_shape",
})  # fmt: skip
