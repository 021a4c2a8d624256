"""`python -m opd_ray` is `opd-ray`, also where no such command is on the path."""

from opd_ray.cli import main

main()
