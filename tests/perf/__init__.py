"""Tests of what measures: the GPU check, run before a GPU sees it."""
