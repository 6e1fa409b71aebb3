import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.model.units import GIB, KIB, MIB, align_up, format_ids, format_size, parse_size


@pytest.mark.parametrize(("size", "quantum", "aligned"), [(0, 128, 0), (1, 128, 128), (128, 128, 128), (129, 128, 256)])
def test_aligns_up_to_the_next_multiple(size: int, quantum: int, aligned: int) -> None:
    assert align_up(size, quantum) == aligned


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (512 * MIB, "512 MiB"), (GIB, "1 GiB"), (1024 * GIB, "1 TiB"), (1500 * KIB, "1500 KiB"),
     (418704 * KIB, "408.9 MiB"),
     (GIB + 1, "1.0 GiB"), (130 * MIB + 5, "130.0 MiB"), (1500 * GIB + 1, "1.5 TiB")],
)  # fmt: skip
def test_shows_sizes_in_the_unit_that_fits(size: int, shown: str) -> None:
    assert format_size(size) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 * GIB), ("4g", 4 * GIB), ("4GiB", 4 * GIB), ("4 GB", 4 * GIB), ("1.5GiB", 1536 * MIB),
     ("512MiB", 512 * MIB), ("1T", 1024 * GIB), ("64K", 64 * KIB), ("4096B", 4096), (" 4G ", 4 * GIB),
     ("0.25T", 256 * GIB)],
)  # fmt: skip
def test_reads_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "4", "4096", "G", "-4G", "4X", "4GG", "4,5G", "1e3M", "0x4G", ".5G", "0.3B", "4iB", "4G 1M", "٤G", "4Gi B"],
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a|has no unit|whole number of bytes"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_reads_back_what_it_shows_where_that_is_exact(size: int) -> None:
    shown = format_size(size)
    assert "." in shown or parse_size(shown) == size


@pytest.mark.parametrize(("ids", "shown"), [((), ""), ((3,), "3"), ((2, 0, 1, 5), "0-2,5"), ((7, 5), "5,7")])
def test_shows_ids_as_the_kernel_does(ids: tuple[int, ...], shown: str) -> None:
    assert format_ids(ids) == shown
