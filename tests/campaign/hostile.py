"""Hostile and odd inputs, drawn: recipes, configurations, headers, reports, seals, plans, texts, places, arguments."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.campaign import damage
from tests.campaign.server import Server, odd_url
from tests.campaign.values import VALUES, changed
from tests.campaign.world import World


@dataclass(frozen=True)
class Case:
    """A command with what it may end with."""

    name: str
    arguments: tuple[str | Path, ...]
    after: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Place:
    """Where a case may write, and what it starts from."""

    here: Path
    world: World
    model: Path
    random: Random

    def recipe(self, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        """Write the recipe, edited."""
        recipe = yaml.safe_load(self.world.recipe.read_text(encoding="utf-8"))
        edit(recipe)
        path = self.here / "recipe.yaml"
        path.write_bytes(yaml.safe_dump(recipe, sort_keys=False).encode("utf-8", "surrogatepass"))
        return path

    def output(self) -> Path:
        """Copy the finished output."""
        shutil.copytree(self.world.out, self.here / "out")
        return self.here / "out"

    def with_model(self) -> tuple[Path, Path]:
        """Copy the model; return it and a recipe that names it."""
        model = self.here / "model"
        shutil.copytree(self.model, model)
        return model, self.recipe(lambda recipe: recipe.update(model=str(model)))


def edit_json(path: Path, random: Random) -> None:
    """Change a JSON file into another well-formed one, or one as Python writes them."""
    loaded = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(changed(loaded, random, random.choice([1, 1, 3]))), encoding="utf-8")


def spoil(path: Path, random: Random) -> None:
    """Make a text file into something else altogether."""
    content = path.read_bytes()
    path.write_bytes(
        random.choice(
            [
                lambda: b"[" * 200_000,
                lambda: b'{"a":' * 50_000,
                lambda: content.decode("utf-8").encode("utf-16"),
                lambda: b"\xef\xbb\xbf" + content,
                lambda: content.replace(b"\n", b"\r\n"),
                lambda: content[: random.randrange(len(content))],
                lambda: content + content,
                lambda: b"\xff" + content,
                lambda: content.replace(b":", b"\0:", 1),
                lambda: b"",
                lambda: b"\0" * 4096,
                lambda: random.randbytes(2000),
                lambda: b"- " * 3000 + content,
                lambda: (
                    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
                    + b"".join(
                        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
                    )
                ),
                lambda: b"%YAML 1.1\n--- !!python/object/apply:os.system ['true']\n",
                lambda: content + b"\n...\n---\n" + content,
                lambda: b"\t" + content,
                lambda: content + b"model: again\n",
                lambda: content + b"\xe2\x80\xae\x1b[31m: 1\n",
                lambda: content + b"x" * 5_000_000,
            ]
        )()
    )


def odd_place(path: Path, random: Random) -> Path:
    """Return something that is no ordinary file."""
    kind = random.randrange(7)
    end = random.choice(["", "-odd", "odd\n::error::x", "odd\x1b[31m", "ödd \u202e", "odd'$(id)"])
    odd = path.with_name(f"{random.randrange(10**6)}{end}")
    if kind == 0:
        odd.mkdir()
    elif kind == 1:
        os.mkfifo(odd)
    elif kind == 2:
        odd.symlink_to(odd)
    elif kind == 3:
        return Path(random.choice(["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "/", "."]))
    elif kind == 4:
        return odd  # it isn't there
    elif kind == 5:
        odd.write_bytes(b"")
    else:
        return Path("x" * 300)
    return odd


# ------------------------------------------------------------------ cases


def a_recipe_changed(place: Place) -> Case:
    path = place.recipe()
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    made = changed(loaded, place.random, place.random.choice([1, 1, 2, 4]))
    path.write_bytes(yaml.safe_dump(made, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return _planned(place, path)


def a_recipe_spoilt(place: Place) -> Case:
    path = place.recipe()
    spoil(path, place.random)
    return _planned(place, path)


def _planned(place: Place, path: Path) -> Case:
    more = place.random.choice([(), ("--json",), ("--fix",), ("--out", place.here / "plan.json")])
    verbs: list[tuple[str | Path, ...]] = [("plan", path, *more), ("plan", path, *more)]
    verbs += [("run", path, "--out", place.here / "o", "--until", "nowhere", "--progress", "none")]
    return Case(path.name, place.random.choice(verbs))


def a_setting(place: Place) -> Case:
    keys = ("seed", "stages[0].finetune.tokens", "stages[9].x", "target", "model", "", "a.b[", "evaluate", "stages")
    value = str(place.random.choice(VALUES))[:5000].replace("\0", "").encode("utf-8", "replace").decode()
    key = place.random.choice(keys)
    return Case("--set", ("plan", place.recipe(), "--set", place.random.choice([f"{key}={value}", f"{key}{value}"])))


def a_config_changed(place: Place) -> Case:
    model, recipe = place.with_model()
    name = place.random.choice(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
    edit_json(model / name, place.random)
    return Case(name, place.random.choice([("plan", recipe), ("plan", recipe), ("recommend", model)]))


def a_config_spoilt(place: Place) -> Case:
    model, recipe = place.with_model()
    name = place.random.choice(["config.json", "tokenizer.json", "generation_config.json"])
    spoil(model / name, place.random)
    return Case(name, ("plan", recipe))


def a_header(place: Place) -> Case:
    """Of safetensors: its length, its JSON, its offsets."""
    model, recipe = place.with_model()
    path = model / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = place.random.randrange(4)
    if how == 0:
        path.write_bytes(
            struct.pack("<Q", place.random.choice([0, 1, 2**63, 2**40, size * 2, 100_000_001])) + content[8:]
        )
    elif how == 1:
        path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000 + data)
    elif how == 2:
        place.random.choice(damage.ALL)(path, place.random)
    else:
        made = json.dumps(changed(header, place.random, 2)).encode()
        path.write_bytes(struct.pack("<Q", len(made)) + made + data)
    return Case("model.safetensors", place.random.choice([("plan", recipe), ("recommend", model)]))


def a_gguf(place: Place) -> Case:
    path = place.here / "model.gguf"
    start = b"GGUF" + struct.pack(
        "<IQQ", *place.random.choice([(3, 1, 1), (3, 2**60, 2**60), (99, 0, 0), (3, 0, 2**33)])
    )
    key = struct.pack("<Q", place.random.choice([20, 2**62])) + b"general.architecture"
    value = (
        struct.pack("<I", place.random.choice([8, 9, 77]))
        + struct.pack("<Q", place.random.choice([5, 2**62]))
        + b"llama"
    )
    path.write_bytes(start + key + value + place.random.randbytes(place.random.choice([0, 5000])))
    return Case("gguf", ("plan", place.recipe(lambda recipe: recipe.update(model=str(path)))))


def a_text(place: Place) -> Case:
    path = place.here / place.random.choice(["text.txt", "text.jsonl", "text.json", "text.txt.gz"])
    path.write_text("one\ntwo\n" * 50, encoding="utf-8")
    spoil(path, place.random)
    if path.suffix == ".gz" and place.random.random() < 0.5:
        path.write_bytes(gzip.compress(bytes(300_000_000), 1))
    template = place.random.choice([None, "{text}", "{a[0].__class__}", "{", {"text": "x"}])

    def edit(recipe: dict[str, Any]) -> None:
        recipe["calibration"] |= {"text": str(path)} | ({"template": template} if template else {})

    return Case(path.name, ("plan", place.recipe(edit)))


def a_task(place: Place) -> Case:
    path = place.here / "task.jsonl"
    rows = [{"prompt": "p", "schema": "CREATE TABLE t (a)", "answer": "SELECT a FROM t"} for _ in range(3)]
    path.write_bytes(b"\n".join(json.dumps(changed(row, place.random)).encode() for row in rows))
    if place.random.random() < 0.3:
        spoil(path, place.random)
    task = {"name": "sql", "text": str(path), "max_tokens": 2}
    return Case("task", ("plan", place.recipe(lambda recipe: recipe["evaluate"].update(tasks=[task]))))


def a_report(place: Place) -> Case:
    out = place.output()
    report = out / "report.json"
    place.random.choice([edit_json, edit_json, spoil])(report, place.random)
    verbs: list[tuple[str | Path, ...]] = [("report", out), ("report", out, "--json"), ("diff", place.world.out, out)]
    verbs += [("diff", out, place.world.out, "--markdown"), ("recommend", place.model, "--report", out)]
    return Case("report.json", place.random.choice(verbs))


def a_seal(place: Place) -> Case:
    out = place.output()
    path = out / place.random.choice(["artifact.json", "artifact.json", "optikit.lock", "recipe.yaml"])
    if path.suffix == ".yaml":
        spoil(path, place.random)
    else:
        place.random.choice([edit_json, edit_json, spoil])(path, place.random)
    verbs: list[tuple[str | Path, ...]] = [
        ("verify", out),
        ("verify", out, "--json"),
        ("reproduce", out, "--offline"),
        ("diff", place.world.out, out),
    ]
    verbs += [("run", place.recipe(), "--out", out, "--until", "nowhere", "--progress", "none")]
    return Case(path.name, place.random.choice(verbs))


def a_plan(place: Place) -> Case:
    path = place.here / "plan.json"
    shutil.copy(place.world.root / "plan.json", path)
    place.random.choice([edit_json, edit_json, edit_json, spoil])(path, place.random)
    return Case("plan.json", ("run", path, "--out", place.here / "o", "--until", "nowhere", "--progress", "none"))


def a_store(place: Place) -> Case:
    """Odd names and contents in the store itself; its own is made for each case."""
    home = place.here / "home"
    for name in ("artifacts", "tmp", "locks", "scratch", "downloads", "corrupt", "jobs"):
        (home / name).mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            odd_place(home / name / "x", place.random)
    (home / "artifacts" / ("0" * 64)).mkdir()
    (home / "artifacts" / ("0" * 64) / "artifact.json").write_bytes(
        place.random.choice([b"", b"[" * 99_999, b"{}", b"\xff"])
    )
    verbs = [("cache", "list"), ("cache", "check"), ("cache", "gc"), ("cache", "gc", "--max-size", "0"), ("doctor",)]
    return Case("store", place.random.choice([*verbs, ("env", "list")]))


def an_odd_place(place: Place) -> Case:
    odd = odd_place(place.here / "x", place.random)
    out = place.here / "o"
    verbs: list[tuple[str | Path, ...]] = [
        *(("plan", odd), ("run", odd, "--out", out), ("run", place.recipe(), "--out", odd, "--until", "nowhere")),
        *(
            ("verify", odd),
            ("report", odd),
            ("diff", odd, odd),
            ("recommend", str(odd)),
            ("generate", odd, "--prompt", "x"),
        ),
        *(
            ("eval", str(odd), "--out", out, "--text", str(place.recipe())),
            ("init", odd),
            ("targets", "--targets", odd),
        ),
        *(("plan", place.recipe(), "--targets", odd), ("plan", place.recipe(), "--out", odd)),
        *(("generate", place.world.out, "--prompts", odd), ("serve", odd), ("reproduce", odd)),
        ("bench", "http://127.0.0.1:1", "--prompts", odd, "--out", out),
        ("bench", odd, "--prompts", place.recipe(), "--out", out),
        ("plan", place.recipe(lambda recipe: recipe.update(model=str(odd)))),
        ("plan", place.recipe(lambda recipe: recipe["calibration"].update(text=str(odd)))),
        ("plan", place.recipe(lambda recipe: recipe.update(extends=str(odd)))),
    ]
    return Case("odd place", place.random.choice(verbs))


def an_argument(place: Place) -> Case:
    value = str(place.random.choice(VALUES))[:2000].replace("\0", "").encode("utf-8", "replace").decode()
    verbs: list[tuple[str | Path, ...]] = [
        *(("explain", value), ("targets", value), ("stages", value), ("schema", value), ("env", "build", value)),
        *(("cache", "gc", "--max-size", value), ("cache", "gc", "--keep", value), ("init", "--model", value)),
        *(("init", "--target", value), ("recommend", value), ("recommend", place.model, "--target", value), (value,)),
        *(("plan", place.recipe(), f"--{value}"), ("eval", value, "--out", place.here / "o", "--text", value)),
        *(("eval", place.model, "--out", place.here / "o", "--task", value), ("serve", value)),
        ("bench", value, "--prompts", place.recipe(), "--out", place.here / "o", "--timeout", "1"),
        ("run", place.recipe(), "--out", place.here / "o", "--until", value),
        ("run", place.recipe(), "--out", place.here / "o", "--until", "nowhere", "--progress", value),
        ("run", place.recipe(), "--out", place.here / "o", "--until", "nowhere", "--device", value),
        ("plan", place.recipe(lambda recipe: recipe.update(target=value))),
    ]
    return Case("argument", place.random.choice(verbs))


def a_url(place: Place) -> Case:
    server, text = Server(place.random), place.here / "text.txt"
    text.write_text("one two three four five\n" * 500, encoding="utf-8")
    port = server.url.split(":")[2].split("/")[0]
    url = server.url if place.random.random() < 0.8 else odd_url(place.random, port)
    url = url.encode("utf-8", "replace").decode()
    some = ("--out", place.here / "o", "--timeout", "2", "--requests", "2", "--new-tokens", "3", "--progress", "none")
    arguments = place.random.choice(
        [
            ("eval", url, "--text", text, "--concurrency", "1", *some),
            ("eval", url, "--text", text, "--concurrency", "1", *some),
            ("bench", url, "--prompts", text, "--clients", "1", *some),
        ]
    )
    return Case("url", arguments, server.stop)


def prompts(place: Place) -> Case:
    path = place.here / place.random.choice(["prompts.txt", "prompts.jsonl"])
    rows = [{"prompt": "The"}, {"prompt": "A longer one than that"}]
    path.write_bytes(b"\n".join(json.dumps(changed(row, place.random)).encode() for row in rows))
    if place.random.random() < 0.5:
        spoil(path, place.random)
    text = str(place.random.choice(VALUES))[:20_000].replace("\0", "").encode("utf-8", "replace").decode()
    asked = place.random.choice([("--prompts", path), ("--prompts", path), ("--prompt", text)])
    return Case(path.name, ("generate", place.world.out, "--max-tokens", "2", *asked))


KINDS: tuple[Callable[[Place], Case], ...] = (
    *(
        a_recipe_changed,
        a_recipe_changed,
        a_recipe_changed,
        a_recipe_spoilt,
        a_setting,
        a_config_changed,
        a_config_spoilt,
    ),
    *(
        a_header,
        a_gguf,
        a_text,
        a_task,
        a_report,
        a_report,
        a_seal,
        a_plan,
        a_plan,
        a_store,
        an_odd_place,
        an_odd_place,
    ),
    *(an_argument, an_argument, a_url, a_url, prompts),
)
