from . import STUDY

STUDY.main(STUDY.parse())
