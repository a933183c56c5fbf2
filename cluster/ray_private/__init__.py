"""All that relies on Ray's private modules, or on switches that its guide does not name; each seen in Ray 2.60.

Where Ray is upgraded, this is the folder to read: it says what each of them is for, and what happens without it. It has
a file for each of Ray's libraries that takes a second to import: an actor that only computes imports `core` alone.
"""
