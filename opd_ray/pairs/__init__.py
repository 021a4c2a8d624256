"""Preference pairs: which files hold them, in which order a run goes through them, and how they are read and written.

index     what the files hold, from their small columns alone: which rows count
order     where every position of the endless stream of pairs is: a function of the index and the seed
pictures  one picture to the model's size
windows   the pairs of a window with their pictures; imports no torch, since many small tasks do it
feedback  Parquet files with labels by a reward in place of people
"""
