"""Serve a gallery over HTTP: Ray Serve replicas, and the application and its page before them.

The page's files lie in the folder page.

config       every setting of the service
refusal      a request that is not answered: status, code, message
options      query parameters, checked, and their OpenAPI description
limits       bytes, seconds and queue; the bearer token
photo_form   the photos of a multipart request, checked by their headers
backend      what the application asks of the replicas
app          the HTTP application
batching     work that waits while a batch is done becomes the next batch
locator      a gallery in one process that answers requests in batches
deployment   locators as replicas of Ray Serve, and the handle that asks them
metrics      requests, seconds by stage, queue and answers
server       a port of this machine, from start to stop

Serve a gallery until it is interrupted:

    run_service(ServeConfig(gallery="regions/lake"), on_start=print)
"""
