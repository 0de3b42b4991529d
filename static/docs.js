"use strict";

if (window.SwaggerUIBundle) { // it is missing without internet
  document.documentElement.classList.toggle("dark-mode", matchMedia("(prefers-color-scheme: dark)").matches);
  SwaggerUIBundle({ dom_id: "#docs", url: "openapi.json", tryItOutEnabled: true, validatorUrl: null });
}
