import tyro

from . import study

study.main(tyro.cli(study.Config, description=study.__doc__))
