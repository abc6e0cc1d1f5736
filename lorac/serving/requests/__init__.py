"""The fields of requests, and the adapters, options and forms of answers that they ask for."""
