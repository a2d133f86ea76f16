"""Asks the rules in order: the first obstacle decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model_registry.compatibility.facts import ArtefactFacts, EngineFacts
from model_registry.compatibility.rules import BUILD_RULES, RULES, Obstacle, Rule, Untold
from wire.messages import Hardware

EVERY_RULE = "every_rule"


@dataclass(frozen=True)
class Verdict:
    """Whether it will run, the rule that decided (`every_rule` when none objects) and its sentence.

    `assumed` names facts that the device does not tell and that were taken for good.
    """

    will_run: bool
    rule: str
    sentence: str
    assumed: tuple[str, ...] = ()


def resolve(facts: ArtefactFacts, device: Hardware) -> Verdict:
    """Whether the artefact loads and runs on the device."""
    return _ask(RULES, facts, device)


def resolve_engine(facts: ArtefactFacts, engine: EngineFacts, device: Hardware) -> Verdict:
    """Whether an engine made from the artefact loads on the device; its graph's operators no longer matter."""
    of_engine = replace(
        facts, runtime=engine.builder, runtime_version=None, providers=(), ir_version=None, opsets={}, operators=(),
        engine=engine,
    )  # fmt: skip
    return _ask(RULES, of_engine, device)


def resolve_build(facts: ArtefactFacts, device: Hardware) -> Verdict:
    """Whether an engine for the device's hardware key can be built from the artefact."""
    return _ask(BUILD_RULES, facts, device)


def _ask(rules: Sequence[Rule], facts: ArtefactFacts, device: Hardware) -> Verdict:
    assumed = []
    for rule in rules:
        finding = rule(facts, device)
        if isinstance(finding, Obstacle):
            return Verdict(False, rule.__name__, finding.sentence)
        if isinstance(finding, Untold):
            assumed.append(finding.fact)
    untold = f", if its {' and '.join(dict.fromkeys(assumed))} suit" if assumed else ""
    return Verdict(True, EVERY_RULE, f"runs: none of {len(rules)} rules objects{untold}", tuple(assumed))
