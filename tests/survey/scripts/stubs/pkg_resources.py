"""Stands in for setuptools' old module, which is gone."""

from __future__ import annotations

from importlib import resources


class Requirement:
    @staticmethod
    def parse(name: str) -> str:
        return name


def resource_filename(package: str, path: str) -> str:
    return str(resources.files(package).joinpath(path.partition("/")[2]))
