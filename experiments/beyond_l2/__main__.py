from . import main, parse

main(parse())
