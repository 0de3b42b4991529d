-- Accept a photo that was just set, or delete it and return why not. A Redis that was paused may get here late,
-- when the poster has been refused already.
local jobs, starts, bytes = unpack(KEYS)
local id, photo, size, posted, most_jobs, seconds = unpack(ARGV)
local longest_pause, share = 3, 0.5  -- seconds; of the memory, or there would be no room for images
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
local used = size + (redis.call('GET', bytes) or 0)

local refusal = false
if now > posted + longest_pause then
  refusal = 'Redis is away (--redis-url).'
elseif redis.call('ZCARD', jobs) >= tonumber(most_jobs) then
  refusal = 'Too many photos wait (--queue).'
elseif memory > 0 and used > memory * share then
  refusal = 'Redis is full of photos that wait (--maxmemory).'
end
if refusal then
  redis.call('DEL', photo)
else
  redis.call('ZADD', jobs, now + seconds, id)
  redis.call('INCRBY', bytes, size)
end
return refusal
