"""Manifests against their schemas, as JSON; run in .venv-kubernetes: python kubernetes_schemas.py FILE...

Objects of Kubernetes, and parts of them: the JSON schemas that kubernetes-validate carries, strictly. Those of KServe have none
in a package; the classes of its SDK say what each field is called and holds, and what is required.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

package = ModuleType("kserve")  # its own __init__ starts a server's worth of imports
package.__path__ = list(getattr(find_spec("kserve"), "submodule_search_locations", None) or [])
sys.modules["kserve"] = package
import kserve.models  # noqa: E402

VERSION = kubernetes_validate.latest_version()
(FOLDER,) = Path(kubernetes_validate.__file__).parent.glob(f"kubernetes-json-schema/v{VERSION}*-local-strict")
SCHEMAS = json.loads((FOLDER / "_definitions.json").read_text())
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def faults(value: Any, kind: str, where: str) -> Iterator[str]:
    """What of `value` is not of the type `kind`, as the SDKs write it: list[V1Container], dict(str, str), ..."""
    if several := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{where} is {value!r}, no list"
            return
        for place, item in enumerate(value):
            yield from faults(item, several[1], f"{where}[{place}]")
    elif several := re.fullmatch(r"dict[(\[]str, (.*)[)\]]", kind):
        for key, item in value.items():
            yield from faults(item, several[1], f"{where}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or isinstance(value, bool) != (kind == "bool"):
            yield f"{where} is {value!r}, no {kind}"
    elif made := getattr(kserve.models, kind, None):
        names = {name: attribute for attribute, name in made.attribute_map.items()}
        yield from (f"{where} has no field {name}" for name in value.keys() - names.keys())
        known = {names[name]: item for name, item in value.items() if name in names}
        try:
            made(**known)
        except ValueError as error:  # a field that is required
            yield f"{where}: {error}"
        for name, item in known.items():
            yield from faults(item, made.openapi_types[name], f"{where}.{name}")
    elif kind != "object":
        (name,) = (one for one in SCHEMAS["$defs"] if re.search(rf"(core|meta)\.v1\.{kind.removeprefix('V1')}$", one))
        schema = {**SCHEMAS, "$ref": f"#/$defs/{name}"}
        yield from (f"{where}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(value))


def main(paths: list[str]) -> None:
    told = dict[str, list[str]]()
    for path in paths:
        for item in yaml.safe_load_all(Path(path).read_text()):
            group, _, version = item["apiVersion"].rpartition("/")
            name = f"{Path(path).name} {item['kind']} {item['metadata']['name']}"
            if group == "serving.kserve.io":
                told[name] = list(faults(item, f"{version.capitalize()}{item['kind']}", item["kind"]))
                continue
            told[name] = []
            try:
                kubernetes_validate.validate(item, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                told[name] = [error.message]
    print(json.dumps(told))


main(sys.argv[1:])
