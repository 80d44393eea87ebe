"""`python -m flexolmo_jax`, the same as `flexolmo`."""

from flexolmo_jax.cli import main

main()
