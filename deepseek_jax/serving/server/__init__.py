"""An OpenAI-compatible HTTP server over the engine: `app.py: application` makes it of a `service.py: Service`."""
