"""No module of the package needs itself: there is no import circle, not even a late one.

import-linter holds the floors; it looks at rooms, so a circle inside one room is not seen by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import grimp
import pytest


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules of which each imports all others, if by way of some."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found: set[str] = set()
        todo = [module]
        while todo:
            new = imports[todo.pop()] - found
            found |= new
            todo += new
        reached[module] = found
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imports if module in reached[module]
    }
    return sorted(map(list, groups))


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Names that only annotations use are not needed."""
    graph = grimp.build_graph("pyvmm", exclude_type_checking_imports=True, cache_dir=None)
    imports = {
        module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules
    }
    assert len(imports) > 100
    assert circles(imports) == []


@pytest.mark.parametrize(("imports", "found"), [
    ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
    ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c"]]),
    ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}},
     [["a", "b", "c"], ["d", "e"]]),
])
def test_a_circle_is_found(imports: dict[str, set[str]], found: list[list[str]]) -> None:
    assert circles(imports) == found
