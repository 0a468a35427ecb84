"""Makes a package, and any module below it, whose every name is there to be imported and raises when it is used."""

import importlib.abc
import importlib.machinery
import sys
import types


class _Absent(type):
    """A name of a library that is not here: may be subclassed, indexed and asked for attributes, but not called."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return make(f"{cls.__name__}.{name}")

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__name__} is not here: this package stands in for a GPU library, for tests")


def make(name):
    return _Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package):
        self._prefix = package + "."

    def find_spec(self, name, path=None, target=None):
        if name.startswith(self._prefix):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        module.__getattr__ = getter(module.__name__)


def getter(package):
    def get(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return make(f"{package}.{name}")

    return get


def stand_in(package):
    """To be called by the package itself; returns its __getattr__."""
    sys.meta_path.append(_Finder(package))
    return getter(package)
