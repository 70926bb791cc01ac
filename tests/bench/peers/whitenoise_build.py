"""What WhiteNoise and Django make of a folder of assets: `python whitenoise_build.py SRC OUT`: hashed names by
ManifestStaticFilesStorage (style sheets only: its rewriting of module imports ends with "Max post-process passes exceeded"
where they are more than five deep), brotli 11 and gzip 9 by WhiteNoise's compressor in its threads."""

from __future__ import annotations

import sys

import django
from django.conf import settings
from django.core.management import call_command

if __name__ == "__main__":
    source, out = sys.argv[1:]
    settings.configure(
        INSTALLED_APPS=["django.contrib.staticfiles"],
        STATIC_URL="/cdn/",
        STATIC_ROOT=out,
        STATICFILES_DIRS=[source],
        STORAGES={"staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"}},
        WHITENOISE_KEEP_ONLY_HASHED_FILES=True,
    )
    django.setup()
    call_command("collectstatic", interactive=False, verbosity=0)
