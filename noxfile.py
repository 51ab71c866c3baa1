"""Every check of the project: `nox -l` lists them, `nox -s NAME` runs one."""

import hashlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import nox

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
DEV = ROOT / ".nox" / "dev"
PEERS = ROOT / ".nox" / "bench"
INTEROP = ROOT / ".nox" / "interop"
BROWSER = ROOT / ".nox" / "browser"

#: Starts of whole programs, and every feature killed after every step: see `long`.
LONG = ("tests/launch", "tests/test_examples.py", "tests/verification/test_everyday_features.py")

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests", "docs", "build"]


def run_in_dev(session: nox.Session, *command: str, **env: str) -> None:
    """Run `command` in the one environment that all sessions but `build` share."""
    path = os.pathsep.join([str(DEV / "bin"), os.environ.get("PATH", "")])
    env = {**env, "PATH": path, "VIRTUAL_ENV": str(DEV)}
    update_dev(session, env)
    session.run(str(DEV / "bin" / command[0]), *command[1:], env=env, external=True)


def update_dev(session: nox.Session, env: dict[str, str]) -> None:
    """Install into the shared environment, unless its stamp says that it is current."""
    # A moved checkout or another Python leaves scripts that point nowhere: start afresh.
    origin = f"{sys.version} {sys.base_prefix} {DEV}"
    inputs = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", CONSTRAINTS))
    current = [origin, hashlib.sha256(inputs).hexdigest()]
    stamp = DEV / "installed.txt"
    found = stamp.read_text().splitlines() if stamp.exists() else []
    if found == current:
        return
    if found[:1] != current[:1]:
        session.run(sys.executable, "-m", "venv", "--clear", str(DEV), external=True)
    stamp.write_text(origin)  # an install cut short must not look finished
    pip = [str(DEV / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS)]
    session.run(*pip, "-e", f"{ROOT}[dev]", env=env, external=True)
    stamp.write_text("\n".join(current))


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train the digits example; arguments after `--` go to it."""
    run_in_dev(session, "python", "examples/digits/train.py", "fit", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    # One thread each: ranks started side by side would otherwise fight over the cores.
    command = ["python", "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    places = ("tests/interop", "tests/examples", "tests/browser", *LONG)
    # Whoever names one of them wants it: pytest would ignore what is named, too.
    asked = tuple(session.posargs)
    apart = [f"--ignore={p}" for p in places if not any(one.startswith(p) for one in asked)]
    run_in_dev(session, *command, *apart, *session.posargs, OMP_NUM_THREADS="1")


@nox.session(venv_backend="none")
def long(session: nox.Session) -> None:
    """Start runs in every way, and kill one with each feature after every step (3 minutes)."""
    command = ["python", "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    run_in_dev(session, *command, *(session.posargs or LONG), OMP_NUM_THREADS="1")


@nox.session(venv_backend="none")
def ray(session: nox.Session) -> None:
    """Train on two workers of Ray (a minute)."""
    command = ["python", "-m", "pytest", "-m", "ray and not faults", "tests/launch/test_ray.py"]
    run_in_dev(session, *command, *session.posargs, OMP_NUM_THREADS="1")


def peers(session: nox.Session, folder: Path, *packages: str) -> Path:
    """The Python of an environment with packages on top of the shared one, which stays as it is."""
    run_in_dev(session, "python", "-c", "pass")  # what it adds to comes first
    pins = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    stamp, wanted = folder / "installed.txt", f"{sys.version} {folder} {packages} {pins}"
    if not stamp.exists() or stamp.read_text() != wanted:
        session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
        (dev,) = (DEV / "lib").glob("python*/site-packages")
        (own,) = (folder / "lib").glob("python*/site-packages")
        (own / "dev.pth").write_text(f"import site; site.addsitedir({str(dev)!r})\n")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS)]
        session.run(*pip, *packages, external=True)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run the benchmarks, or those named after `--`, against other tools (an hour in all)."""
    python = str(peers(session, PEERS, "accelerate", "pytorch-ignite"))
    found = sorted((ROOT / "tests" / "benchmarks").glob("bench_*.py"))
    wanted = [p for p in found if not session.posargs or p.stem[6:] in session.posargs]
    for path in [*wanted, ROOT / "tests" / "benchmarks" / "publish.py"]:
        session.run(python, str(path), env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(venv_backend="none")
def pictures(session: nox.Session) -> None:
    """Make the pictures of the pages from real runs (minutes); names after `--` choose some."""
    install_chromium(session)
    python = str(peers(session, BROWSER, "selenium"))
    session.run(python, "docs/pictures/pictures.py", *session.posargs, external=True)


@nox.session(venv_backend="none")
def interop(session: nox.Session) -> None:
    """Kill and resume every example, and runs with other libraries, all of them installed."""
    libraries = "datasets gymnasium mlflow-skinny optuna peft torchdata transformers wandb".split()
    libraries += ["onnx", "onnxscript", "onnxruntime"]
    python = str(peers(session, INTEROP, *libraries))
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    places = session.posargs or ["tests/interop", "tests/examples"]
    session.run(*command, *places, env={"OMP_NUM_THREADS": "1"}, external=True)


def install_chromium(session: nox.Session) -> None:
    """Install a browser and its driver, where they are missing and Debian's packages are there."""
    if all(map(shutil.which, ("chromium", "chromedriver"))) or not shutil.which("apt-get"):
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    session.run("apt-get", "update", "-qq", external=True)
    install = ["apt-get", "install", "-qq", "--no-install-recommends"]
    session.run(
        *install, "-y", "chromium", "chromium-driver", env=quiet, external=True, silent=True
    )


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """Open the pages of reports in a Chromium without a window, and use them."""
    install_chromium(session)
    python = str(peers(session, BROWSER, "selenium"))
    places = session.posargs or ["tests/browser"]
    session.run(python, "-m", "pytest", *places, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Kill runs at every step and at random instants, and fuzz the command line (25 minutes)."""
    seed = os.environ.get("FAULTS_SEED") or str(random.randrange(1_000_000))
    session.log(f"FAULTS_SEED={seed}")
    command = ["python", "-m", "pytest", "-v", "-n", "auto", "--dist", "worksteal", "-m", ""]
    folders = ["faults", "launch", "coordination", "dropin", "cli/test_fuzz.py", "test_examples.py"]
    command += [*(f"tests/{name}" for name in folders), *session.posargs]
    run_in_dev(session, *command, OMP_NUM_THREADS="1", FAULTS_SEED=seed)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    run_in_dev(session, "ruff", "check", *session.posargs)
    run_in_dev(session, "ruff", "format", "--check", *session.posargs)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types with mypy."""
    run_in_dev(session, "mypy", *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error."""
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # the theme's own news, not a warning of this build
    run_in_dev(session, "mkdocs", "build", "--strict", "--site-dir", "site", **quiet)


IMPORT_CHECK = """
import sys, dream_trainer
heavy = {"torch", "lightning"} & set(sys.modules)
assert not heavy, f"import dream_trainer loads {heavy}"
for name in dream_trainer.__all__:
    getattr(dream_trainer, name)
print(len(dream_trainer.__all__), "public names from", dream_trainer.__file__)
"""


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, then use the wheel where no checkout is near."""
    session.install("-q", "-c", str(CONSTRAINTS), "build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")  # the wheel from the sdist
    (wheel,) = (ROOT / "dist").glob("*.whl")

    # An ignore pattern can swallow a source folder; only the built wheel shows it.
    package = ROOT / "src" / "dream_trainer"
    files = [*package.rglob("*.py"), *package.glob("reporting/assets/*")]
    sources = {path.relative_to(ROOT / "src").as_posix() for path in files}
    missing = (sources | {"dream_trainer/py.typed"}) - set(ZipFile(wheel).namelist())
    if missing:
        session.error(f"not in {wheel.name}: {', '.join(sorted(missing))}")

    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run("python", "-m", "venv", "clean")
        python = str(Path(folder, "clean", "bin", "python"))
        pip = [python, "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS)]
        session.run(*pip, str(wheel), external=True)
        session.run(python, "-I", "-c", IMPORT_CHECK, external=True)
        session.run(str(Path(folder, "clean", "bin", "dream-trainer")), "--help", external=True)
        session.run(python, "-I", "-m", "dream_trainer", "--help", external=True)
