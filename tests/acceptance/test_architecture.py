"""The walls of the house."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipelines", "registry", "deploy", "monitoring", "infra")
HEAVY = ("torch", "transformers", "peft", "mlflow", "prefect", "optuna", "pandas", "scipy", "sklearn", "datasets")


def test_left_may_import_right_never_back() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_package_belongs_to_this_distribution_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, ["tunesmith"])) == {"tunesmith"}, f"{name} belongs to {owners[name]}"
        found = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__file__)"],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(found.stdout.strip()).parent == ROOT / name


def test_one_file_knows_prefect_and_one_knows_mlflow() -> None:
    for package, owner in (("prefect", "pipelines/flows.py"), ("mlflow", "registry/mlflow.py")):
        importers = {
            path.relative_to(ROOT).as_posix()
            for name in PACKAGES
            for path in (ROOT / name).rglob("*.py")
            for line in path.read_text().splitlines()
            if line.strip().startswith((f"import {package}", f"from {package}"))
        }
        assert importers <= {owner}


def test_help_and_light_commands_import_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "sys.argv = ['tunesmith', *sys.argv[1:]]\n"
        "from pipelines import cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): cli.main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    for arguments in (["--help"], ["up", "--help"], ["versions", "--help"], ["keys", "--help"], ["status"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"TUNESMITH_HOME": "/nonexistent"},
        )
        assert done.stdout.strip().splitlines()[-1] == "[]", f"tunesmith {' '.join(arguments)}: {done.stdout}"


def test_a_foreign_pipelines_folder_is_not_taken_for_ours(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('foreign code ran')")
    script = Path(sys.executable).with_name("tunesmith")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([script, "doctor", "--json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert '"findings"' in done.stdout, done.stderr
