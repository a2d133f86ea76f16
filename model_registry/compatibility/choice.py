"""The best artefact of a release for a device: the first of the device's targets that every rule lets through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model_registry.compatibility.facts import ArtefactFacts
from model_registry.compatibility.resolver import Verdict, resolve
from wire.messages import Hardware


@dataclass(frozen=True)
class Choice:
    """What a device gets: the target (None: nothing) and the reason, with every verdict by target."""

    target: str | None
    rule: str
    reason: str
    verdicts: Mapping[str, Verdict]


def choose(targets: Sequence[str], facts: Callable[[str], ArtefactFacts], device: Hardware) -> Choice:
    """Choose among the release's `targets`; a device's own list says which it wants most."""
    if not device.targets:
        return Choice(None, "target", "it has not said which targets it runs", {})
    wanted = [target for target in device.targets if target in targets]
    if not wanted:
        sentence = f"no artefact for its targets {', '.join(device.targets)}; the release has {', '.join(targets)}"
        return Choice(None, "target", sentence, {})
    verdicts = {target: resolve(facts(target), device) for target in wanted}
    refused = [(target, verdict) for target, verdict in verdicts.items() if not verdict.will_run]
    chosen = next((target for target in wanted if verdicts[target].will_run), None)
    why_not = "; ".join(f"{target} {verdict.sentence}" for target, verdict in refused)
    if chosen is None:
        return Choice(None, refused[0][1].rule, why_not, verdicts)
    passed = [(target, verdict) for target, verdict in refused if wanted.index(target) < wanted.index(chosen)]
    reason = f"{chosen} {verdicts[chosen].sentence}"
    if passed:
        reason += "; wanted more: " + "; ".join(f"{target} {verdict.sentence}" for target, verdict in passed)
    return Choice(chosen, verdicts[chosen].rule, reason, verdicts)
