"""Draws the pictures of the documentation as SVG: `python -m launch.pictures`.

Pictures follow the colour scheme of the page, or of the reader's system. No text in them is smaller than 9 pt.
"""
