"""JSON Schema (draft-07) of a recipe as its author writes it, for editors and other tools.

pydantic describes the loaded recipe in the 2020-12 draft; editors' YAML servers read draft-07. So the parts are put
together here: the recipe's own keys from `Recipe`, the options of every stage from its `Options`, and what only the
loader knows: `vars`, `extends`, `${name}` in place of any value, and that nothing is required of a recipe that extends
another. Not described: `${name}` as a method.
"""

from __future__ import annotations

from typing import Any

from optikit import stages
from optikit.deploy.servers import SERVERS
from optikit.recipe.schema import GATE_METRICS, Recipe

Schema = dict[str, Any]

_MAPS = frozenset({"properties", "patternProperties"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SINGLE = frozenset({"items", "additionalProperties", "not", "contains", "propertyNames"})
_DROPPED = frozenset({"title", "discriminator", "$defs"})
_SHOWN = frozenset({"description", "default"})


def export() -> Schema:
    """Return the JSON Schema of recipes with every stage that is installed."""
    recipe, definitions = _parts(Recipe.model_json_schema(ref_template="#/definitions/{model}"), "")
    for name in ("StageEntry", "StageOptions", "ServeEntry", "Shared"):
        definitions.pop(name, None)
    definitions["Gate"]["anyOf"] = [{"required": [limit]} for limit in ("min", "max", "steps")]
    needs = _requirements(recipe, definitions)
    for schema in (recipe, *definitions.values()):
        schema.pop("required", None)
    stage, stage_definitions = _stage()
    server, server_definitions = _server()
    properties = {
        "extends": {
            "type": "string",
            "minLength": 1,
            "description": "Recipe to start from, relative to this file: mappings merge, null takes one out, "
            "anything else replaces.",
        },
        "vars": {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_-]*$"},
            "additionalProperties": {"type": ["string", "number", "boolean"]},
            "description": "Names for values; ${name} stands for them anywhere else.",
        },
        **recipe["properties"],
        "stages": {"type": "array", "items": stage, "description": recipe["properties"]["stages"]["description"]},
        "serve": {"type": "array", "items": server, "description": recipe["properties"]["serve"]["description"]},
        "gates": {**recipe["properties"]["gates"], "properties": _gates(), "additionalProperties": False},
    }
    for name in ("evaluate", "cost", "gates"):
        properties[name] = _or_null(properties[name])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "optikit recipe",
        "description": recipe["description"],
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": needs,
        "definitions": {"variable": _VARIABLE, **definitions, **stage_definitions, **server_definitions},
    }


_VARIABLE: Schema = {
    "type": "string",
    "pattern": r"^\$\{[A-Za-z_][A-Za-z0-9_-]*\}$",
    "description": "A name from `vars`.",
}


def _gates() -> Schema:
    reference = [{"$ref": "#/definitions/Gate"}]
    return {name: _or_null({"allOf": reference, "description": meaning}) for name, meaning in GATE_METRICS.items()}


def _or_null(schema: Schema) -> Schema:
    """Allow null, which takes out what an extended recipe has there."""
    if schema.get("type") == "object":
        return {**schema, "type": ["object", "null"]}
    return {"anyOf": [schema, {"type": "null"}], "description": schema.get("description", "")}


def _server() -> tuple[Schema, dict[str, Schema]]:
    """Return the schema of one entry of `serve`, and those of every server that it refers to."""
    definitions: dict[str, Schema] = {}
    for name, row in SERVERS.items():
        template = f"#/definitions/serve-{name}-{{model}}"
        options, inner = _parts(row.Options.model_json_schema(ref_template=template), f"serve-{name}-")
        properties = {"server": {"const": name}, **options.get("properties", {})}
        definitions |= inner | {f"serve-{name}": {**options, "properties": properties, "required": ["server"]}}
    branches = [{"$ref": f"#/definitions/serve-{name}"} for name in SERVERS]
    return {"oneOf": [{"enum": list(SERVERS)}, *branches]}, definitions


def _stage() -> tuple[Schema, dict[str, Schema]]:
    """Return the schema of one stage, and those of every verb and method that it refers to."""
    definitions: dict[str, Schema] = {}
    verbs: Schema = {}
    for verb, methods in stages.registry().items():
        for method in methods:
            definitions |= _method(verb, method)
        if methods:
            definitions[verb] = {"oneOf": [{"$ref": f"#/definitions/{verb}-{method}"} for method in methods]}
            verbs[verb] = {"$ref": f"#/definitions/{verb}"}
    # One verb exactly: said by count rather than by oneOf, so that an editor names the misspelt key.
    stage = {
        "type": "object",
        "properties": verbs,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return stage, definitions


def _method(verb: str, method: str) -> dict[str, Schema]:
    """Return the schema of a method, with one for each library that can do it, which has options of its own."""
    prefix = f"{verb}-{method}"
    own = stages.load(verb, method).Options
    if "backend" in own.model_fields:
        return _written(verb, method, stages.OURS, prefix, {"type": "string"})
    others = [name for name in stages.backend_names(verb, method) if name != stages.OURS]
    if not others:
        return _written(verb, method, stages.OURS, prefix, {"const": stages.OURS})
    definitions = _written(verb, method, stages.OURS, f"{prefix}-{stages.OURS}", {"const": stages.OURS})
    for name in others:
        definitions |= _written(verb, method, name, f"{prefix}-{name}", {"const": name})
        definitions[f"{prefix}-{name}"]["required"].append("backend")
    branches = [{"$ref": f"#/definitions/{prefix}-{name}"} for name in (stages.OURS, *others)]
    return {prefix: {"oneOf": branches}, **definitions}


def _written(verb: str, method: str, backend: str, prefix: str, who: Schema) -> dict[str, Schema]:
    stage = stages.load(verb, method, backend)
    template = f"#/definitions/{prefix}-{{model}}"
    options, definitions = _parts(stage.Options.model_json_schema(ref_template=template), f"{prefix}-")
    key = stages.method_key(verb)
    properties = {
        key: {"const": method},
        "backend": {**who, "default": backend, "description": "Who does the work."},
        **options.get("properties", {}),
    }
    required = [key, *options.get("required", [])]
    written = {**options, "description": stage.SUMMARY, "properties": properties, "required": required}
    return {prefix: written, **definitions}


def _parts(schema: Schema, prefix: str) -> tuple[Schema, dict[str, Schema]]:
    """Return a pydantic schema as draft-07, and its definitions apart, their names prefixed."""
    definitions = {f"{prefix}{name}": _draft7(inner) for name, inner in schema.get("$defs", {}).items()}
    return _draft7(schema), definitions


def _draft7(schema: Schema) -> Schema:
    """Return a schema in draft-07, in which any scalar that isn't free text may also be a variable."""
    out: Schema = {}
    for key, value in schema.items():
        if key in _MAPS:
            out[key] = {name: _draft7(inner) for name, inner in value.items()}
        elif key in _LISTS:
            out["items" if key == "prefixItems" else key] = [_draft7(inner) for inner in value]
        elif key in _SINGLE and isinstance(value, dict):
            out["additionalItems" if "prefixItems" in schema else key] = _draft7(value)
        elif key == "description":
            out[key] = " ".join(value.split())
        elif key not in _DROPPED:
            out[key] = value
    return _with_words(out)


def _with_words(schema: Schema) -> Schema:
    """Return the schema wrapped where draft-07 would ignore its description, or where a variable may stand."""
    words = {key: value for key, value in schema.items() if key in _SHOWN}
    rule = {key: value for key, value in schema.items() if key not in _SHOWN}
    if "$ref" in rule and words:
        return {"allOf": [rule], **words}
    if rule.get("type") in {"integer", "number", "boolean"} or "enum" in rule or "const" in rule:
        return {"anyOf": [rule, {"$ref": "#/definitions/variable"}], **words}
    return schema


def _requirements(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return only what a schema requires, down through everything that it refers to."""
    found: Schema = {"required": schema["required"]} if "required" in schema else {}
    inner: Schema = {}
    for name, value in schema.get("properties", {}).items():
        for branch in (value, *value.get("allOf", []), *value.get("anyOf", [])):
            reference = branch.get("$ref", "").rsplit("/", 1)[-1]
            needs = _requirements(definitions.get(reference, {}), definitions)
            inner |= {name: needs} if needs else {}
    return found | ({"properties": inner} if inner else {})
