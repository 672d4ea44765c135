"""All settings, in one file, from the environment. Below this door everything is an argument."""

from __future__ import annotations

from pathlib import Path

import environ
from csp.constants import NONE, SELF
from django.utils.translation import gettext_lazy as _

env = environ.Env()
ROOT = Path(__file__).resolve().parent.parent

DEBUG = env.bool("DEBUG", default=False)
SECRET_KEY = env.str("SECRET_KEY")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", default=[])

# Deltaworks
ARTIFACT_ROOT = env.str("ARTIFACT_ROOT")
"""The content-addressed store: a folder, or ``s3://bucket/prefix`` (keys and endpoint: ``AWS_…`` variables)."""
ARTIFACT_CACHE = env.str("ARTIFACT_CACHE", default="")
"""Where copies of a bucket's blobs lie on this machine; by default below the home folder."""
SWEEP_GRACE_DAYS = env.int("SWEEP_GRACE_DAYS", default=7)
"""Blobs that nothing needs are offered for freeing when they were last written so long ago."""
STEP_KEEP_DAYS = env.int("STEP_KEEP_DAYS", default=30)
"""Intermediate results are kept so long after their job ended, for retries and clones."""
SURVEY_MINUTES = env.int("SURVEY_MINUTES", default=60)
"""How often a worker looks through the store for what could be freed and what is missing."""
SCRUB_HOURS = env.float("SCRUB_HOURS", default=24)
"""Within so many hours every blob is hashed once."""
STORAGE_TEND_SECONDS = env.float("STORAGE_TEND_SECONDS", default=10)
"""How often a worker process looks whether the store wants something done; 0: this one never does."""
IMPORT_ROOTS = env.dict("IMPORT_ROOTS", default={})
"""Folders that an import may read, by name: ``IMPORT_ROOTS=models=/srv/models,demo=/srv/demo``."""
LEASE_SECONDS = env.int("LEASE_SECONDS", default=60)
HEARTBEAT_SECONDS = env.int("HEARTBEAT_SECONDS", default=15)
IDLE_LOOK_SECONDS = env.float("IDLE_LOOK_SECONDS", default=10)
"""A worker that hears of no work looks for some by itself this often: so long after its lease a lost step runs."""
RETRY_SECONDS = env.int("RETRY_SECONDS", default=5)
"""The pause before a step that broke is tried again, times how often it broke."""
PROGRESS_LIMIT_SECONDS = env.int("PROGRESS_LIMIT_SECONDS", default=900)
PROGRESS_LIMIT_FACTOR = env.float("PROGRESS_LIMIT_FACTOR", default=10.0)
"""A step that has not moved for PROGRESS_LIMIT_FACTOR times what steps of its kind take, and for at least
PROGRESS_LIMIT_SECONDS, is killed although its worker is alive."""
RESUME_FREE_BYTES = env.int("RESUME_FREE_BYTES", default=256_000_000)
"""A job that waits for room on the disk goes on when so much is free."""
STEP_DEVICE = env.str("STEP_DEVICE", default="auto")
"""Where steps compute: cpu, cuda, or auto (cuda where there is one)."""
STEP_MEMORY_LIMIT_MB = env.int("STEP_MEMORY_LIMIT_MB", default=0)
"""Address-space limit of a computing child in MB; 0 means none."""
APPROVAL_REQUEST_DAYS = env.int("APPROVAL_REQUEST_DAYS", default=7)
APPROVAL_DAYS = env.int("APPROVAL_DAYS", default=30)
ROLLBACK_CERTIFICATE_HOURS = env.int("ROLLBACK_CERTIFICATE_HOURS", default=24)
SERVER_STALE_SECONDS = env.int("SERVER_STALE_SECONDS", default=15)
UPLOAD_LIMIT_BYTES = env.int("UPLOAD_LIMIT_BYTES", default=16_000_000)

INSTALLED_APPS = [
    "dashboard",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "django_htmx",
    "pgtrigger",
    "pghistory",
    "template_partials",
    "csp",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "dashboard.middleware.LanguageMiddleware",
    "pghistory.middleware.HistoryMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "dashboard.middleware.OperationErrorMiddleware",
]
ROOT_URLCONF = "dashboard.urls"
WSGI_APPLICATION = "dashboard.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [ROOT / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.template.context_processors.i18n",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "dashboard.context_processors.shell",
            ],
        },
    }
]

DATABASES = {"default": {**env.db_url("DATABASE_URL"), "CONN_HEALTH_CHECKS": True, "CONN_MAX_AGE": 60}}
DATABASES["default"].setdefault("OPTIONS", {}).setdefault("connect_timeout", 5)
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "dashboard.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
CSRF_FAILURE_VIEW = "dashboard.views.errors.csrf_failure"
LOGIN_URL = "sign-in"
LOGIN_REDIRECT_URL = "overview"
LOGOUT_REDIRECT_URL = "sign-in"

LANGUAGE_CODE = "en"
LANGUAGES = [("en", _("English")), ("ja", _("Japanese"))]
LOCALE_PATHS = [ROOT / "dashboard" / "locale"]
USE_I18N = True
USE_TZ = True
TIME_ZONE = env.str("TIME_ZONE", default="UTC")

STATIC_URL = "static/"
STATIC_ROOT = env.str("STATIC_ROOT", default=str(ROOT / "staticfiles"))
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.InMemoryStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG or env.bool("PLAIN_STATIC", default=False)
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}
WHITENOISE_USE_FINDERS = DEBUG or env.bool("PLAIN_STATIC", default=False)
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_000_000
FILE_UPLOAD_MAX_MEMORY_SIZE = UPLOAD_LIMIT_BYTES

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
        "base-uri": [NONE],
    }
}
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
HTTPS = env.bool("HTTPS", default=False)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SECURE_SSL_REDIRECT = HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"

PGHISTORY_APPEND_ONLY = True
PGHISTORY_DEFAULT_TRACKERS: list[object] = []

CELERY_BROKER_URL = env.str("CELERY_BROKER_URL", default="")
WORKER_QUEUES = env.list("WORKER_QUEUES", default=["cpu"])

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "formatter": "line"}},
    # They tell with each connection where they found keys and endpoint.
    "loggers": {name: {"level": "WARNING"} for name in ("aiobotocore", "botocore")},
    "root": {"handlers": ["stdout"], "level": env.str("LOG_LEVEL", default="INFO")},
}
