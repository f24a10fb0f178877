"""Varied JSON schemas through a whole job: does every answer that ended by itself validate?

    python -m bench.schemas [COUNT] [OVERRIDES...]

Each schema is asked for greedily and at temperature 1.5. What llguidance cannot compile is an error line.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

WORDS = ("name", "age", "city", "tags", "score", "owner", "id", "note")
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green)+$", "[aeiou]$", "^\\d{4}(-\\d{2}){1,2}$")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "uri")


def schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose parts are nested up to `depth` deep."""
    plain = (_string, _number, _choice)
    return chance.choice(plain if depth == 0 else (*plain, _object, _object, _array, _union, _reference))(chance, depth)


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    kind = chance.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": chance.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": chance.choice(FORMATS)}
    least = chance.randrange(4)
    return (
        {"type": "string", "minLength": least, "maxLength": least + chance.randrange(12)}
        if kind == 2
        else {
            "type": "string",
            "maxLength": 20,
        }
    )


def _number(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randrange(-50, 50)
    bounds = {chance.choice(("minimum", "exclusiveMinimum")): least}
    bounds[chance.choice(("maximum", "exclusiveMaximum"))] = least + chance.randrange(2, 1000)
    kind = chance.choice(("integer", "integer", "number"))
    return {"type": kind, **bounds, **({"multipleOf": 2} if kind == "integer" and chance.random() < 0.3 else {})}


def _choice(chance: random.Random, depth: int) -> dict[str, Any]:
    values = ["x", "é\n", 3, -1.5, True, None, {"a": [1]}, []]
    if chance.random() < 0.3:
        return {"const": chance.choice(values)}
    return {"enum": chance.sample(values, chance.randrange(1, 5))}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(WORDS, chance.randrange(1, 4))
    made: dict[str, Any] = {"type": "object", "properties": {name: schema(chance, depth - 1) for name in names}}
    made["required"] = names[: chance.randrange(len(names) + 1)]
    made["additionalProperties"] = chance.choice((False, False, {"type": "integer"}))
    return made


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randrange(3)
    made = {"type": "array", "items": schema(chance, depth - 1)}
    if chance.random() < 0.3:
        made["prefixItems"] = [schema(chance, depth - 1)]
    return {**made, "minItems": least, "maxItems": least + chance.randrange(1, 4)}


def _union(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.7:
        return {"anyOf": [schema(chance, depth - 1) for _ in range(chance.randrange(2, 4))]}
    return {"oneOf": [_string(chance, 0), {"type": "boolean"}, {"type": "null"}]}


def _reference(chance: random.Random, depth: int) -> dict[str, Any]:
    name = f"part{chance.randrange(10**6)}"
    tree = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}}
    defs = {name: schema(chance, 0), "tree": {**tree, "additionalProperties": False}}
    both = {"one": {"$ref": f"#/$defs/{name}"}, "tree": {"$ref": "#/$defs/tree"}}
    return {"type": "object", "properties": both, "required": ["one"], "additionalProperties": False, "$defs": defs}


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many schemas, the same for a seed; `$defs` lie at the root."""
    return [_lifted(schema(random.Random(f"{seed}/{nth}"))) for nth in range(count)]


def _lifted(made: dict[str, Any]) -> dict[str, Any]:
    defs: dict[str, Any] = {}

    def lift(part: Any) -> Any:
        if isinstance(part, list):
            return [lift(each) for each in part]
        if not isinstance(part, dict):
            return part
        defs.update({name: lift(each) for name, each in part.get("$defs", {}).items()})
        return {key: lift(each) for key, each in part.items() if key != "$defs"}

    return {**lift(made), **({"$defs": defs} if defs else {})}


def problem(text: str, of: dict[str, Any]) -> str | None:
    """Why `text` is no answer to the schema, None if it is one."""
    try:
        draft = jsonschema.Draft202012Validator
        draft(of, format_checker=draft.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def main(count: int, overrides: list[str]) -> None:
    asked = schemas(count)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        with source.open("w") as file:
            for nth, of in enumerate(asked):
                prompt = {"role": "user", "content": f"Answer with JSON, an example of {json.dumps(of)}"}
                form = {"type": "json_schema", "json_schema": {"name": "example", "schema": of}}
                for temperature in (0, 1.5):
                    body = {"messages": [prompt], "response_format": form, "temperature": temperature, "seed": nth}
                    line = {"custom_id": f"{nth}/{temperature}", "url": "/v1/chat/completions", "body": body}
                    file.write(json.dumps(line) + "\n")
        job = [f"workload.source={source}", f"output.dir={folder}/out", "sampling.max_tokens=200", *overrides]
        subprocess.run([sys.executable, "-m", "deserve.run", *job], check=True)
        outcomes: Counter[str] = Counter()
        for line in Path(folder, "out", "results.jsonl").read_text().splitlines():
            entry = json.loads(line)
            nth, body = int(entry["custom_id"].split("/")[0]), entry["response"]["body"]
            if "error" in body:
                outcomes[body["error"]["code"]] += 1
                print(entry["custom_id"], body["error"]["message"])
                continue
            (choice,) = body["choices"]
            wrong = problem(choice["message"]["content"], asked[nth]) if choice["finish_reason"] == "stop" else None
            outcomes["invalid" if wrong else choice["finish_reason"]] += 1
            if wrong:
                print(entry["custom_id"], wrong, choice["message"]["content"], json.dumps(asked[nth]), sep="\n  ")
    print(dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:])
