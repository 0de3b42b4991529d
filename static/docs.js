"use strict";

// Without internet there is no SwaggerUIBundle.
if (window.SwaggerUIBundle) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.classList.toggle("dark-mode", dark);
  SwaggerUIBundle({
    dom_id: "#docs",
    url: "openapi.json",
    tryItOutEnabled: true,
    validatorUrl: null,
  });
}
