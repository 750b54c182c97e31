"""One HTTP client: requests, responses, connections, TLS, proxies, and what their failures mean."""
