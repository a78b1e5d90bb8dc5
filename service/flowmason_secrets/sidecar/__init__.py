"""Beside a program that needs secrets: run it with them, or keep a file of them current."""
