// A proxy over Fastify and @fastify/http-proxy: `node fastify_proxy.cjs ORIGIN PORT`.
'use strict'

const fastify = require('fastify')()

fastify.register(require('@fastify/http-proxy'), { upstream: process.argv[2], undici: { connections: 64, pipelining: 1 } })
fastify.listen({ host: '127.0.0.1', port: Number(process.argv[3]) })
