"""What compliance asks for: a CycloneDX ML-BOM of a model and an in-toto statement about its weights, ready to sign.

The bill of materials names the model, the sha256 of every weight file, computed here and now, and the digest of the
attention statistics. Where the model was compared with another, a relation that was detected stands under
`pedigree.variants`, which CycloneDX keeps for relations of unknown direction: no test here shows who came first. The
tests' numbers are properties `llmfp:…`, and the fingerprint and the comparison lie beside the BOM, named by digest.
The statement (in-toto Statement v1) has the weight files for its subject and the BOM for its predicate.

Sources: https://cyclonedx.org/docs/1.6/json/, https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md.
Checked against CycloneDX's own JSON schema.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmfp import __version__
from llmfp.checkpoint import Checkpoint
from llmfp.errors import CheckpointError, LlmfpError
from llmfp.report import tables, words

if TYPE_CHECKING:
    from cyclonedx.model import ExternalReference, HashType, Property
    from cyclonedx.model.component import Component

Json = Mapping[str, Any]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://cyclonedx.org/bom"
_CHUNK_BYTES = 1 << 20
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, PREDICATE_TYPE)


@dataclass(frozen=True, slots=True)
class File:
    """A file by its content."""

    name: str
    nbytes: int
    sha256: str


def ready() -> None:
    """Raises LlmfpError where the CycloneDX library is not installed."""
    if find_spec("cyclonedx") is None:
        raise LlmfpError("attest needs cyclonedx-python-lib", hint="pip install 'llmfp[attest]'")


def weight_files(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> tuple[File, ...]:
    """Every weight file with its sha256: local ones read whole, a megabyte at a time, others as the Hub states it.

    progress  called with (bytes done, bytes in all)
    Raises CheckpointError for a file that changed since its header was read, for one that a cache keeps under the hash
    of another content, and for one elsewhere whose hash nobody states.
    """
    paths = [shard.path for shard in checkpoint.shards]
    shared = {name for name, count in Counter(path.name for path in paths).items() if count > 1}
    total, done = sum(shard.nbytes for shard in checkpoint.shards if shard.remote is None), 0
    files = []
    for shard in checkpoint.shards:
        name = f"{shard.path.parent.name}/{shard.path.name}" if shard.path.name in shared else shard.path.name
        if shard.remote is not None:
            if shard.sha256 is None:
                raise CheckpointError(
                    f"{shard.path}: its sha256 is not known where it lies", hint="download the model and attest that"
                )
            files.append(File(name, shard.nbytes, shard.sha256))
            continue
        hashed = hashlib.sha256()
        with shard.path.open("rb") as file:
            shard.check_unchanged(os.fstat(file.fileno()))
            while chunk := file.read(_CHUNK_BYTES):
                hashed.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            shard.check_unchanged(os.fstat(file.fileno()))
        sha256 = hashed.hexdigest()
        if shard.sha256 not in (None, sha256):
            raise CheckpointError(
                f"{shard.path}: its sha256 is {sha256}, but the cache keeps it as {shard.sha256}",
                hint="the file is damaged or was altered: download it again",
            )
        files.append(File(name, shard.nbytes, sha256))
    return tuple(files)


def known_files(source: Json) -> tuple[File, ...]:
    """The weight files that a saved fingerprint names, where it names their digests. Raises LlmfpError."""
    files = source["files"]
    if not files or not all(file.get("sha256") for file in files):
        raise LlmfpError(
            f"{source['name']}: the fingerprint does not hold the digests of its weight files",
            hint="attest the model itself",
        )
    return tuple(File(str(file["name"]), int(file["bytes"]), str(file["sha256"])) for file in files)


def bill_of_materials(
    fingerprint: Json, files: Sequence[File], beside: Sequence[File] = (), comparison: Json | None = None
) -> str:
    """The ML-BOM, CycloneDX 1.6 as JSON.

    fingerprint, comparison  what `scan --json` and `compare --json` print; in `comparison` the model is A
    files                    its weights
    beside                   evidence kept beside the BOM
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(fingerprint, files, beside, comparison)
    tool = Component(name="llmfp", version=__version__, type=ComponentType.APPLICATION)
    identity = json.dumps([[file.sha256 for file in (*files, *beside)], fingerprint["digest"]])
    bom = Bom(
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[tool])),
        serial_number=uuid.uuid5(_NAMESPACE, identity),
    )
    written = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library has no model cards yet; CycloneDX's schema has.
    parameters = {"architectureFamily": fingerprint["architecture"]}
    if isinstance(model_type := fingerprint["source"].get("model_type"), str):
        parameters["modelArchitecture"] = model_type
    written["metadata"]["component"]["modelCard"] = {"modelParameters": parameters}
    return json.dumps(written, indent=2)


def statement(files: Sequence[File], bom: str) -> dict[str, Any]:
    """The in-toto statement: these files, of which the BOM is said. Unsigned."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.name, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": json.loads(bom),
    }


def _model(fingerprint: Json, files: Sequence[File], beside: Sequence[File], comparison: Json | None) -> Component:
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    source = fingerprint["source"]
    pedigree = None
    if comparison is not None:
        related = comparison["verdict"] == "related"
        pedigree = Pedigree(variants=[_other(comparison["b"])] if related else (), notes=_notes(comparison))
    return Component(
        name=source["name"],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=source.get("revision"),
        bom_ref="model",
        hashes=[_sha256(files[0].sha256)] if len(files) == 1 else (),
        components=[
            Component(
                name=file.name, type=ComponentType.FILE, bom_ref=f"weights-{n}", hashes=[_sha256(file.sha256)],
                properties=_properties({"bytes": file.nbytes}),
            )
            for n, file in enumerate(files)
        ],
        pedigree=pedigree,
        external_references=[_reference(file) for file in beside],
        properties=_properties(
            {
                "fingerprint:schema": fingerprint["schema"],
                "fingerprint:digest": fingerprint["digest"],
                "fingerprint:made-by": f"{fingerprint['run']['backend']} ({fingerprint['run']['simd']})",
                "layers": len(fingerprint["layers"]),
                "hidden-size": fingerprint["hidden_size"],
                **({} if comparison is None else _evidence(comparison)),
            }
        ),
    )  # fmt: skip


def _other(side: Json) -> Component:
    """The model that a relation was detected with."""
    from cyclonedx.model.component import Component, ComponentType

    known = [file["sha256"] for file in side["source"]["files"] if file.get("sha256")]
    return Component(
        name=side["name"],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=side["source"].get("revision"),
        bom_ref="variant",
        hashes=[_sha256(known[0])] if len(known) == 1 == len(side["source"]["files"]) else (),
        properties=_properties({"fingerprint:digest": side["digest"]}),
    )


def _notes(comparison: Json) -> str:
    """The verdict in words, what it does not show, and the caveats."""
    return "\n".join(
        [
            f"A is {comparison['a']['name']}, this component; B is {comparison['b']['name']}.",
            words.verdict(comparison),
            *(f"Not shown: {each}" for each in words.NOT_SHOWN),
            *(f"Would have escaped: {each}." for each in comparison["missed"]),
            *(f"Caveat: {each}." for each in comparison["caveats"]),
        ]
    )


def _evidence(comparison: Json) -> dict[str, Any]:
    """The comparison's numbers as properties."""
    named: dict[str, Any] = {
        "comparison:schema": comparison["schema"],
        "comparison:with": comparison["b"]["name"],
        "comparison:with-digest": comparison["b"]["digest"],
        "comparison:verdict": comparison["verdict"],
        "comparison:p-value": comparison["p_value"],
        "comparison:basis": comparison["basis"],
        "comparison:alpha": comparison["alpha"],
        "comparison:rests-on": ", ".join(comparison["rests_on"]),
    }
    columns = tables.tests(comparison)
    for row in zip(*columns.values(), strict=True):
        test = dict(zip(columns, row, strict=True))
        for key in ("score", "z", "p_value", "basis", "reason"):
            named[f"comparison:{test['test']}:{key.replace('_', '-')}"] = test[key]
    return named


def _properties(named: Mapping[str, Any]) -> list[Property]:
    from cyclonedx.model import Property

    return [Property(name=f"llmfp:{name}", value=str(value)) for name, value in named.items() if value is not None]


def _sha256(content: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=content)


def _reference(file: File) -> ExternalReference:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    return ExternalReference(type=ExternalReferenceType.EVIDENCE, url=XsUri(file.name), hashes=[_sha256(file.sha256)])
