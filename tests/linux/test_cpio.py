"""The archive format, against a reader of its own."""

from __future__ import annotations

import stat

from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.linux.cpio import pack_cpio
from tests.support.cpio import unpack


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=9),
        st.binary(max_size=9),
    )
)
def test_cpio_gives_back_names_modes_and_contents(files: dict[str, bytes]) -> None:
    entries = [(name, stat.S_IFREG | 0o640, data) for name, data in files.items()]
    assert unpack(pack_cpio(entries)) == {
        name: (stat.S_IFREG | 0o640, data) for name, data in files.items()
    }
