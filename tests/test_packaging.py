"""What pip makes of the project, in a fresh environment of every Python found, without Ray."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest
from support.servers import PATIENCE

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[1]
START_UP_FILES = ["ray_valkey_spill.pth", "ray_valkey_spill.start"]

FITTING_RAY = """
_external_storage = None

class ExternalStorage:
    def _get_objects_from_store(self, object_refs):
        ...
    def _put_object_to_store(self, metadata, data_size, file_like, object_ref, owner_address):
        ...

def setup_external_storage(config, node_id, session_name):
    return "the fake's own"
"""
OTHER_RAY = FITTING_RAY.replace("session_name", "cluster_name")

# What subprocesses begin with.
PRELUDE = """\
import sys
def finders():
    return [f for f in sys.meta_path if getattr(f, "__name__", "") == "RayValkeySpillFinder"]
def ours():
    return {name for name in sys.modules if name.partition(".")[0] == "ray_valkey_spill"}
"""


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # Nothing of the environment these tests run in may reach the one under test.
    ours = ("PYTHON", "RAY_VALKEY_SPILL_", "VIRTUAL_ENV")
    return subprocess.run(
        command,
        env={name: value for name, value in os.environ.items() if not name.startswith(ours)},
        cwd="/",  # a checkout must not be importable by being the current directory
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def _interpreters() -> dict[str, str]:
    """The Pythons found, by version: the one that runs this, pyenv's, and those on PATH."""
    names = [f"python3.{minor}" for minor in range(10, 16)]
    candidates: list[str | None] = []
    if shutil.which("pyenv"):
        versions = Path(_run("pyenv", "root").stdout.strip(), "versions")
        candidates += [str(path) for name in names for path in versions.glob(f"*/bin/{name}")]
    # These come last because pyenv's shims are among them, and slow to say they lead nowhere.
    candidates += [shutil.which(name) for name in names]
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for path in candidates:
        version = path.rpartition("python")[2] if path else ""
        # Some distributions split off what an environment is made with.
        probe = "import ensurepip, venv; print('usable')"
        if path and version not in found and _run(path, "-c", probe).stdout == "usable\n":
            found[version] = path
    return found


INTERPRETERS = _interpreters()


@dataclass(frozen=True)
class Environment:
    root: Path
    version: str

    @property
    def site_packages(self) -> Path:
        return self.root / "lib" / f"python{self.version}" / "site-packages"

    def entries(self) -> set[str]:
        """What lies in site-packages and beside the interpreter."""
        return {
            path.name for at in (self.site_packages, self.root / "bin") for path in at.iterdir()
        }

    def copy(self, root: Path) -> Environment:
        shutil.copytree(self.root, root, symlinks=True)
        return Environment(root, self.version)

    def python(self, code: str, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run `code`, which must succeed."""
        script = PRELUDE + textwrap.dedent(code)
        done = _run(self.root / "bin" / "python", *flags, "-c", script)
        assert done.returncode == 0, done.stderr
        return done

    def pip(self, command: str, *arguments: str | Path) -> None:
        options = ("-q", "--disable-pip-version-check")
        # Not by the script pip, which in a copy leads back to the original.
        done = _run(self.root / "bin" / "python", "-m", "pip", command, *options, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that goes at once, because environments are large and pytest keeps its own."""
    directory = tmp_path_factory.mktemp("packaging")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def project(scratch: Path) -> Path:
    """A copy of the project, because building may leave files behind."""
    left_out = shutil.ignore_patterns(
        ".[!c]*", "__pycache__", "*.egg-info", "build", "dist", "*venv*"
    )
    return shutil.copytree(PROJECT, scratch / "project", ignore=left_out)


@pytest.fixture(scope="module")
def bare(scratch: Path) -> Callable[[str], Environment]:
    """Gives, by version of Python, an environment with nothing but what venv puts there."""

    @functools.cache
    def environment(version: str) -> Environment:
        root = scratch / f"bare-{version}"
        done = _run(INTERPRETERS[version], "-m", "venv", root)
        assert done.returncode == 0, done.stdout + done.stderr
        return Environment(root, version)

    return environment


@pytest.fixture(scope="module")
def wheel(scratch: Path, project: Path, bare: Callable[[str], Environment]) -> Path:
    """One for all Pythons."""
    bare(next(iter(INTERPRETERS))).pip("wheel", "--no-deps", "-w", scratch / "wheels", project)
    (wheel,) = (scratch / "wheels").iterdir()
    return wheel


@pytest.fixture(scope="module")
def sdist(scratch: Path, project: Path, bare: Callable[[str], Environment]) -> Path:
    environment = bare(next(iter(INTERPRETERS))).copy(scratch / "sdist")
    environment.pip("install", "hatchling")
    code = f"""
    import os, hatchling.build as backend
    os.chdir({str(project)!r})
    print(backend.build_sdist({str(scratch)!r}))
    """
    return scratch / environment.python(code).stdout.split()[-1]


@pytest.fixture(scope="module", params=INTERPRETERS)
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


@pytest.fixture(scope="module", params=["wheel", "editable"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def installed(
    version: str,
    kind: str,
    scratch: Path,
    project: Path,
    wheel: Path,
    bare: Callable[[str], Environment],
) -> Environment:
    """An environment with this project, and with nothing that it depends on."""
    environment = bare(version).copy(scratch / f"{kind}-{version}")
    environment.pip("install", "--no-deps", *(["-e", project] if kind == "editable" else [wheel]))
    return environment


@pytest.fixture
def fake_ray(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a package named ray, whose external_storage has a given source."""

    def make(external_storage: str) -> Path:
        private = tmp_path / "ray" / "_private"
        private.mkdir(parents=True)
        (private.parent / "__init__.py").write_text('__version__ = "9.9.9"\n')
        (private / "__init__.py").touch()
        (private / "external_storage.py").write_text(external_storage)
        return tmp_path

    return make


def test_the_wheel_is_for_every_python_and_has_nothing_but_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    name_and_version, _, tags = wheel.stem.partition("-py")
    assert tags == "3-none-any"
    modules = (PROJECT / "ray_valkey_spill").rglob("*.py")
    package = {str(path.relative_to(PROJECT)) for path in modules}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert sorted(names) == sorted(
        [
            *(package | {"ray_valkey_spill/py.typed"}),
            *(f"{name_and_version}.dist-info/{name}" for name in about),
            *START_UP_FILES,
        ]
    )


def test_the_metadata_are_the_projects(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "ray-valkey-spill"
    assert metadata["Version"] == wheel.name.split("-")[1]
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (PROJECT / "README.md").read_bytes()
    assert metadata.get_payload(decode=True) == readme
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.M)
    assert metadata["Requires-Python"] == f">={named[0]}"


def test_the_sdist_has_all_of_the_project_and_nothing_else(sdist: Path, project: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
    roots = {member.name.partition("/")[0] for member in members}
    assert roots == {sdist.name.removesuffix(".tar.gz")}
    found = {member.name.partition("/")[2]: bool(member.mode & 0o100) for member in members}
    del found["PKG-INFO"]
    files = ["CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.cfg"]
    directories = [".ci", "benchmarks", "deploy", "docs", "ray_valkey_spill", "tests"]
    paths = [project / name for name in files]
    for name in directories:
        paths += [path for path in (project / name).rglob("*") if path.is_file()]
    assert found == {str(path.relative_to(project)): os.access(path, os.X_OK) for path in paths}


def test_the_sdist_makes_the_same_wheel(
    scratch: Path, sdist: Path, wheel: Path, bare: Callable[[str], Environment]
) -> None:
    into = scratch / "from-sdist"
    bare(next(iter(INTERPRETERS))).pip("wheel", "--no-deps", "-w", into, sdist)
    contents = []
    for path in (wheel, into / wheel.name):
        with zipfile.ZipFile(path) as archive:
            contents.append({each.filename: each.CRC for each in archive.infolist()})
    assert contents[0] == contents[1]


def test_the_start_up_files_lie_where_python_looks_for_them_and_nowhere_else(
    installed: Environment, kind: str
) -> None:
    for name in START_UP_FILES:
        expected = (PROJECT / "ray_valkey_spill" / name).read_bytes()
        assert (installed.site_packages / name).read_bytes() == expected
    package = installed.site_packages / "ray_valkey_spill"
    assert package.is_dir() is (kind == "wheel")
    found = [path.name for path in installed.root.rglob("ray_valkey_spill.*")]
    assert sorted(found) == START_UP_FILES


@pytest.mark.parametrize("flag", ["", "-I"])
def test_the_finder_is_there_and_nothing_is_printed(installed: Environment, flag: str) -> None:
    done = installed.python("assert len(finders()) == 1", *flag.split())
    assert (done.stdout, done.stderr) == ("", "")


def test_starting_an_interpreter_imports_nothing_of_ours(
    installed: Environment, version: str
) -> None:
    if tuple(map(int, version.split("."))) >= (3, 15):
        pytest.skip("has .start files, which import what they call")
    # This lists every import, also one that is taken out of sys.modules again.
    assert "ray_valkey_spill" not in installed.python("", "-X", "importtime").stderr
    listed = installed.python("import ray_valkey_spill", "-X", "importtime").stderr
    assert "ray_valkey_spill" in listed


def test_the_version_is_the_packages(installed: Environment) -> None:
    code = """
    import importlib.metadata, ray_valkey_spill
    assert importlib.metadata.version("ray-valkey-spill") == ray_valkey_spill.__version__
    """
    installed.python(code)


@pytest.mark.parametrize("flag", ["", "-I"])
def test_ray_gets_a_storage_of_this_package(
    installed: Environment, fake_ray: Callable[[str], Path], flag: str
) -> None:
    code = f"""
    import types
    sys.path.insert(0, {str(fake_ray(FITTING_RAY))!r})
    # Stands in for the one module that needs Ray itself.
    storage = sys.modules["ray_valkey_spill.plugin.storage"] = types.ModuleType("storage")
    storage.ValkeyStorage = lambda *args, **params: [args, params]
    import ray._private.external_storage as module
    config = {{"type": "valkey", "params": {{"url": "valkey://u"}}}}
    made = module.setup_external_storage(config, "node", "session")
    assert made == [("node", "session"), {{"url": "valkey://u"}}]
    assert module._external_storage is made
    assert module.setup_external_storage({{"type": "other"}}, "n", "s") == "the fake's own"
    """
    done = installed.python(code, *flag.split())
    assert (done.stdout, done.stderr) == ("", "")


def test_a_ray_of_another_shape_is_refused(
    installed: Environment, fake_ray: Callable[[str], Path]
) -> None:
    code = f"""
    sys.path.insert(0, {str(fake_ray(OTHER_RAY))!r})
    import ray._private.external_storage as module
    from ray_valkey_spill import __version__
    from ray_valkey_spill.errors import IncompatibleRayError
    try:
        module.setup_external_storage({{"type": "valkey", "params": {{}}}}, "node", "session")
    except IncompatibleRayError as error:
        assert f"ray-valkey-spill {{__version__}} does not fit Ray 9.9.9" in str(error)
        print("refused")
    """
    done = installed.python(code)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_uninstalling_leaves_nothing(
    installed: Environment, version: str, scratch: Path, bare: Callable[[str], Environment]
) -> None:
    environment = installed.copy(scratch / "uninstalled")
    try:
        environment.python("assert len(finders()) == 1")
        environment.python("import ray_valkey_spill.config")
        assert {*START_UP_FILES, "ray-valkey-spill"} <= environment.entries()
        environment.pip("uninstall", "-y", "ray-valkey-spill")
        assert environment.entries() == bare(version).entries()
        done = environment.python("assert not finders() and not ours()", "-X", "dev")
        assert (done.stdout, done.stderr) == ("", "")
    finally:
        shutil.rmtree(environment.root)
