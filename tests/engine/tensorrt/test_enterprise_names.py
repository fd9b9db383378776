"""Every name of TensorRT that the package uses exists in the enterprise bindings as well as in those of TensorRT-RTX.

The enterprise library cannot be had from a package index, its Python bindings can. They need nine functions of the
library to be imported, so a stub with these is compiled. What is used is found by following types through the source:
through assignments, arguments and results of the package's own functions (by their names), attributes of classes, and
the return types that the bindings' own docstrings state.
"""

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import helixflow.engine.tensorrt
from helixflow.engine.tensorrt.library import load

PACKAGE = Path(helixflow.engine.tensorrt.__file__).parent
# Interprets networks of TensorRT-RTX, in proofs without a GPU.
NOT_FOR_ENTERPRISE = {"interpreter.py", "interpreter_layers.py"}
# Used behind `library.rtx` only: class ("": the module), name.
RTX_ONLY = {
    *(("", name) for name in ("ComputeCapability", "EngineValidity", "EngineInvalidityDiagnostics")),
    *(("", name) for name in ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy")),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("Runtime", "engine_header_size"),
    ("Runtime", "get_engine_validity"),
    ("EngineValidity", "INVALID"),
    ("EngineValidity", "SUBOPTIMAL"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("CudaGraphStrategy", "DISABLED"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("DynamicShapesKernelSpecializationStrategy", "NONE"),
    ("IExecutionContext", "is_stream_capturable"),
}
STUB = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { return 0; }
"""
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
PROBE = """
import ctypes, json, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt
def there(owner, name):
    place = trt
    for part in filter(None, [*owner.split("."), name]):
        if not hasattr(place, part):
            return False
        place = getattr(place, part)
    return True
found = [there(owner, name) for owner, name in json.load(sys.stdin)]
json.dump({"version": trt.__version__, "found": found}, sys.stdout)
"""
Types = frozenset[str]
MODULE, NOTHING = frozenset({"module"}), frozenset[str]()
Use = tuple[str, str]


class Scope:
    """Types of the names of one function, within those of what encloses it."""

    def __init__(self, around: "Scope | None" = None) -> None:
        self.around = around
        self.names: dict[str, set[str]] = defaultdict(set)

    def types(self, name: str) -> Types:
        """What is known of a name."""
        if name in self.names or self.around is None:
            return frozenset(self.names.get(name, ()))
        return self.around.types(name)


class Shared:
    """What files know of each other, by name: types of attributes, and of results of functions; parameters.

    `functions`: whether to follow calls of the package's own functions, which confuses those of one name.
    """

    def __init__(self, functions: bool) -> None:
        self.functions = functions
        self.attributes: dict[str, set[str]] = defaultdict(set)
        self.results: dict[str, set[str]] = defaultdict(set)
        self.parameters: dict[str, list[tuple[Scope, list[str]]]] = defaultdict(list)

    def facts(self) -> int:
        """How much is known."""
        return sum(map(len, self.attributes.values())) + sum(map(len, self.results.values()))


class Uses:
    """Attributes of TensorRT that a file uses. A type is "module", "class X", "X" (an object), or "call X.f"."""

    def __init__(self, trt: Any, tree: ast.Module, shared: Shared) -> None:
        """`shared` is extended."""
        self.trt, self.tree, self.shared = trt, tree, shared
        self.scopes: dict[ast.AST, Scope] = {}
        self._enter(tree, Scope())
        self.found: set[Use] = set()
        self.unknown: set[Use] = set()

    def _enter(self, node: ast.AST, scope: Scope, owner: str = "") -> None:
        """Notes the scope of everything inside a node; `owner`: the class it is in."""
        self.scopes[node] = scope
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            scope = Scope(scope)
            names = [argument.arg for argument in node.args.args if argument.arg != "self"]
            scope.names.update({name: {"module"} if name == "trt" else set() for name in names})
            if isinstance(node, ast.FunctionDef):
                self.shared.parameters[owner if node.name == "__init__" else node.name].append((scope, names))
        owner = node.name if isinstance(node, ast.ClassDef) else ""
        for child in ast.iter_child_nodes(node):
            self._enter(child, scope, owner)

    def learn(self) -> int:
        """Follows every assignment once; the number of facts known afterwards."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._assign(target, node.value)
            elif not self.shared.functions:
                continue
            elif isinstance(node, ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        self.shared.results[node.name] |= self._type(inner.value)
            elif isinstance(node, ast.Call) and not self._type(node.func):
                for scope, parameters in self.shared.parameters.get(_name(node.func), ()):
                    for parameter, argument in zip(parameters, node.args, strict=False):
                        scope.names[parameter] |= self._type(argument)
        scopes = set(self.scopes.values())
        return sum(len(types) for scope in scopes for types in scope.names.values()) + self.shared.facts()

    def collect(self) -> None:
        """Fills `found`, and `unknown` with attributes that no class an object may have has."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                self._use(self._type(node.value), node.attr)
            elif isinstance(node, ast.ClassDef):
                owners = {owner for base in node.bases for owner in self._type(base) if owner.startswith("class ")}
                for owner in owners:
                    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
                    known = [name for name in methods if hasattr(self._python(owner), name) and name != "__init__"]
                    self.found |= {(owner.removeprefix("class "), name) for name in known}

    def _use(self, owners: Types, name: str) -> None:
        if name.startswith("__"):
            return
        owners = frozenset(owner for owner in owners if not owner.startswith("call "))
        having = {owner for owner in owners if hasattr(self._python(owner), name)}
        self.found |= {("" if owner == "module" else owner.removeprefix("class "), name) for owner in having}
        if owners and not having:
            self.unknown |= {(owner, name) for owner in owners}

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its)
        elif isinstance(target, ast.Name):
            self.scopes[target].names[target.id] |= self._type(value)
        elif isinstance(target, ast.Attribute) and not self._type(target.value):
            self.shared.attributes[target.attr] |= self._type(value)

    def _type(self, node: ast.expr) -> Types:
        if isinstance(node, ast.Name):
            return self.scopes[node].types(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._type(node.value), node.attr)
        if isinstance(node, ast.IfExp):
            return self._type(node.body) | self._type(node.orelse)
        if isinstance(node, ast.Call):
            return self._call(node)
        return NOTHING

    def _attribute(self, owners: Types, name: str) -> Types:
        if not owners:
            return MODULE if name == "trt" else frozenset(self.shared.attributes.get(name, ()))
        types: set[str] = set()
        for owner in owners:
            member = getattr(self._python(owner), name, None)
            if isinstance(member, type):
                types.add(owner + "." + name if owner.startswith("class ") else f"class {name}")
            elif isinstance(member, property):
                types |= self._returned(member.fget.__doc__)
            elif callable(member):
                types.add(f"call {owner.removeprefix('class ')}.{name}")
        return frozenset(types)

    def _call(self, node: ast.Call) -> Types:
        callees = self._type(node.func)
        types: set[str] = set() if callees else set(self.shared.results.get(_name(node.func), ()))
        for callee in callees:
            if callee.startswith("class "):
                types.add(callee.removeprefix("class "))
            elif callee.startswith("call "):
                owner, _, name = callee.removeprefix("call ").rpartition(".")
                types |= self._returned(getattr(self._python(owner), name).__doc__)
        return frozenset(types)

    def _returned(self, doc: str | None) -> set[str]:
        """Classes of the bindings that a docstring's signatures say are returned."""
        returned = re.findall(r"^(?:\d+\. )?\w*\(.*\) -> (.*)$", doc or "", re.MULTILINE)
        names = {name for text in returned for name in re.findall(r"tensorrt_rtx\.(\w+)", text)}
        return {name for name in names if isinstance(getattr(self.trt, name, None), type)}

    def _python(self, owner: str) -> Any:
        if owner == "module":
            return self.trt
        return functools.reduce(getattr, owner.removeprefix("class ").split("."), self.trt)


def _name(function: ast.expr) -> str:
    """What a called function is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def sources() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.glob("*.py")) if path.name not in NOT_FOR_ENTERPRISE)


def search(functions: bool) -> list[Uses]:
    trt = load("tensorrt-rtx").trt
    shared = Shared(functions)
    files = [Uses(trt, ast.parse(path.read_text(encoding="utf-8")), shared) for path in sources()]
    known = -1
    while (now := sum(file.learn() for file in files)) != known:
        known = now
    for file in files:
        file.collect()
    return files


@pytest.fixture(scope="module")
def found() -> set[Use]:
    return set().union(*(file.found for file in search(functions=True)))


def test_the_search_finds_what_is_there(found: set[Use]) -> None:
    """One name of each kind, so that a search that lost its way does not pass for a clean result."""
    expected = {
        ("", "float16"),
        ("", "Builder"),
        ("Builder", "create_network"),
        ("Builder", "build_serialized_network"),
        ("INetworkDefinition", "add_kv_cache_update"),
        ("IKVCacheUpdateLayer", "update_lengths"),
        ("IKVCacheUpdateLayer", "get_output"),
        ("IAttention", "mask"),
        ("AttentionIOForm", "PACKED_NHD"),
        ("CausalMaskKind", "LOWER_RIGHT"),
        ("ITensor", "dtype"),
        ("IShuffleLayer", "reshape_dims"),
        ("IOptimizationProfile", "set_shape"),
        ("IProgressMonitor", "step_complete"),
        ("ILogger", "log"),
        ("ILogger.Severity", "ERROR"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("TensorIOMode", "INPUT"),
    }
    assert expected <= found
    assert len(found) > 150


def test_rtx_has_every_name() -> None:
    """Spelling mistakes, above all where no test runs for want of a device."""
    assert not set().union(*(file.unknown for file in search(functions=False)))


def test_enterprise_has_every_name(found: set[Use], tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "stub.c").write_text(STUB)
    for name in LIBRARIES:
        target = ["-o", str(tmp_path / name), f"-Wl,-soname,{name}"]
        subprocess.run([compiler, "-shared", "-fPIC", "-w", str(tmp_path / "stub.c"), *target], check=True)
    names = sorted(found)
    # In a process of its own: the bindings of both libraries in one would share a library's global state.
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *(str(tmp_path / name) for name in LIBRARIES)],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["version"].startswith("11.")
    missing = {name for name, there in zip(names, answer["found"], strict=True) if not there}
    assert missing == RTX_ONLY
