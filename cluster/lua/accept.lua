-- Make a job of a photo that was just set, and send it to a worker; or delete it, and return why.
local id, posted, most_jobs, overdue = unpack(ARGV)
local longest_pause = 3  -- seconds; when Redis was away for longer, the poster has been refused
local share = 0.5  -- of the memory; the rest is for images
local photo, time = 'faces:photo:' .. id, redis.call('TIME')
local size, now = redis.call('HSTRLEN', photo, 'photo'), time[1] + time[2] / 1e6
local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
local refusal

if now > posted + longest_pause then
  refusal = 'Redis is away (--redis-url).'
elseif redis.call('ZCARD', 'faces:jobs') >= tonumber(most_jobs) then
  refusal = 'Too many photos wait (--queue).'
elseif memory > 0 and (redis.call('GET', 'faces:bytes') or 0) + size > memory * share then
  refusal = 'Redis is full of photos that wait (--maxmemory).'
end
if refusal then
  redis.call('DEL', photo)
  return refusal
end

-- A call of annotate(), as Celery reads it from its list (its message protocol 2)
local message = cjson.encode({
  headers = {task = 'faces.annotate', id = id},
  body = cjson.encode({{id}, {}, {}}),  -- the arguments
  ['content-type'] = 'application/json', ['content-encoding'] = 'utf-8',
  properties = {delivery_tag = id, delivery_info = {exchange = '', routing_key = 'faces:queue'}},
})
redis.call('HSET', photo, 'message', message)
redis.call('INCRBY', 'faces:bytes', size)
redis.call('ZADD', 'faces:jobs', now + overdue, id)
redis.call('LPUSH', 'faces:queue', message)
