"""Will this artefact run on this device? Answered from what both say of themselves, before a byte is downloaded.

`facts` says what decides about an artefact, `wire.messages.Hardware` what a device reports, `rules` are one function
each with a name, `tables` is what the rules know about runtimes, `resolver` asks them in order, `choice` picks the best
artefact of a release for a device, `hardware_key` names the kind of hardware that one engine serves. Pure: no disk, no
network, no runtime is imported; the control plane, the compiler and the agent ask the same rules.

A rule refuses when the two sides contradict each other. What a device does not tell is not held against it, it is named
in the verdict instead; engines and providers are different: what is not told to be there is not there.
"""

from model_registry.compatibility.choice import Choice, choose
from model_registry.compatibility.facts import ArtefactFacts, EngineFacts, engine_facts, facts_of
from model_registry.compatibility.hardware_key import HardwareKey, key_of
from model_registry.compatibility.resolver import Verdict, resolve, resolve_build, resolve_engine

__all__ = [
    "ArtefactFacts",
    "Choice",
    "EngineFacts",
    "HardwareKey",
    "Verdict",
    "choose",
    "engine_facts",
    "facts_of",
    "key_of",
    "resolve",
    "resolve_build",
    "resolve_engine",
]
