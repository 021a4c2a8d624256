"""The parts of a start."""

from opd_ray.startup import Startup


def test_parts_add_up_and_are_said():
    times = iter([0.0, 5.0, 6.0, 21.5, 22.0])
    startup = Startup(clock=lambda: next(times))
    for part in ("imports", "Ray", "workers", "Ray"):
        startup.mark(part)
    assert startup.parts == {"imports": 5.0, "Ray": 1.5, "workers": 15.5}
    assert str(startup) == "first drawing after 22 s: imports 5.0 s, Ray 1.5 s, workers 16 s"
