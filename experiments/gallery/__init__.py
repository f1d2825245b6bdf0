"""What others have done, in a page each: `python -m experiments.gallery.NAME`.

Each draws a figure into `results/gallery`, and ends with an error unless a closed form,
or another program, says the same.
"""
