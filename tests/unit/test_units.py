import pytest

from kvmagent.model.units import GIB, KIB, MIB, align_up, format_ids, format_size


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


@pytest.mark.parametrize(("ids", "shown"), [((), ""), ((3,), "3"), ((2, 0, 1, 5), "0-2,5"), ((7, 5), "5,7")])
def test_shows_ids_as_the_kernel_does(ids: tuple[int, ...], shown: str) -> None:
    assert format_ids(ids) == shown
