"""The control plane's web pages: templates, static files, and the handlers that fill them through the API."""

from cloud.control.pages.routes import install as install
from cloud.control.pages.routes import router as router
