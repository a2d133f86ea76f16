"""How many threads a step on a CPU gets: measured at start on the loaded model, for prompts and for decoding each.

More threads than physical cores never pay, and a container's quota or affinity may leave fewer; between one and that
many only a measurement knows, since decoding is bound by memory and prompts by arithmetic. All cores are tried first,
so that a model too slow for the budget keeps them. Opens nothing but the kernel's own files; the clock comes from
outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUDGET_S = 2.0
ROUNDS = 3
PREFILL_STEPS = 5  # a prompt of `probe.PROMPT_TOKENS` takes about so many steps of decoding
STALL = 3  # times slower than the best: so many threads stall, and prompts need not try
CGROUPS = Path("/sys/fs/cgroup")
Step = Callable[[int], None]  # runs one step with so many threads


@dataclass(frozen=True)
class ThreadPlan:
    """Threads of a step with prompt tokens and of one that only decodes; best measured times in ms by threads."""

    prefill: int
    decode: int
    prefill_ms: Mapping[int, float]
    decode_ms: Mapping[int, float]
    unmeasured: str = "too slow to measure"  # why there are no times

    def of(self, num_tokens: Iterable[int]) -> int:
        """Threads of a step whose sequences have so many new tokens each."""
        return self.prefill if any(count > 1 for count in num_tokens) else self.decode

    @property
    def reason(self) -> str:
        """One line for logs and status."""
        parts = [("prefill", self.prefill, self.prefill_ms), ("decode", self.decode, self.decode_ms)]
        return "; ".join(
            f"{name}: {chosen} threads ({_figures(times) or self.unmeasured})" for name, chosen, times in parts
        )


def given(num_threads: int) -> ThreadPlan:
    """What somebody asked for, unmeasured."""
    return ThreadPlan(num_threads, num_threads, {}, {}, "given")


def wanted(num_threads: int, environment: Mapping[str, str]) -> int:
    """What the option says, else OMP_NUM_THREADS (the first of a list); 0 when neither does."""
    value = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return num_threads or (int(value) if value.isdecimal() else 0)


def measure(
    prefill: Step, decode: Step, num_cores: int, clock: Callable[[], float], budget_s: float = BUDGET_S
) -> ThreadPlan:
    """Time both kinds of step with 1, 2, 4 .. `num_cores` threads, for `budget_s` in all, and take the best of each.

    The last step may overrun the budget. When time ends while more threads still help, all cores are taken; where none
    is left for prompts, they get what decoding gets.
    """
    end = clock() + budget_s
    counts = thread_counts(num_cores)
    decode_ms = _best_ms(decode, counts, clock, end - budget_s / 2)
    shortest_ms = min(decode_ms.values())
    for_decode = _fastest(decode_ms, counts)
    if clock() + PREFILL_STEPS * shortest_ms / 1e3 > end:
        return ThreadPlan(for_decode, for_decode, {}, decode_ms)
    counts = [count for count in counts if decode_ms.get(count, 0.0) <= STALL * shortest_ms]
    prefill_ms = _best_ms(prefill, counts, clock, end)
    return ThreadPlan(_fastest(prefill_ms, counts), for_decode, prefill_ms, decode_ms)


def thread_counts(num_cores: int) -> list[int]:
    """The counts worth trying: powers of two, and all cores."""
    return [*(1 << n for n in range(num_cores.bit_length()) if 1 << n < num_cores), num_cores]


def count_cores(
    cpus: Collection[int], topology: Path = Path("/sys/devices/system/cpu"), cgroup: Path | None = None
) -> int:
    """Physical cores among `cpus` (the affinity), no more than the control group's quota rounded up; at least 1."""
    cores = len({_core(topology, cpu) for cpu in cpus})
    quota = find_quota(own_cgroup() if cgroup is None else cgroup)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def own_cgroup(membership: Path = Path("/proc/self/cgroup")) -> Path:
    """Folder of this process's control group (version 2); that of all where the kernel does not tell."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return CGROUPS
    return next((CGROUPS / line[3:].strip("/") for line in lines if line.startswith("0::")), CGROUPS)


def find_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time that a control group and those above it (or version 1) allow; None without a limit."""
    quotas = []
    for folder in (cgroup, *cgroup.parents):
        for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
            try:
                quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _best_ms(step: Step, counts: Sequence[int], clock: Callable[[], float], end: float) -> dict[int, float]:
    best: dict[int, float] = {}
    for _ in range(ROUNDS):
        for count in counts:
            began = clock()
            expected_ms = best.get(count, min(best.values(), default=0.0))
            if began + expected_ms / 1e3 > end:
                return best
            step(count)
            best[count] = min(best.get(count, math.inf), (clock() - began) * 1e3)
    return best


def _fastest(times_ms: Mapping[int, float], counts: Sequence[int]) -> int:
    best = min(times_ms, key=lambda count: (times_ms[count], count))
    is_cut = len(times_ms) < len(counts)
    return counts[-1] if is_cut and best == max(times_ms) else best


def _figures(times_ms: Mapping[int, float]) -> str:
    return ", ".join(f"{count}: {times_ms[count]:.1f} ms" for count in sorted(times_ms))


def _core(topology: Path, cpu: int) -> str:
    """Names the core of a CPU by its siblings; where the kernel does not tell, every CPU is one."""
    try:
        return (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
