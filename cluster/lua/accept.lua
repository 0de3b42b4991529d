-- Keep a photo and list it as a job, or return why not. A Redis that was paused may get here late,
-- when the poster has been refused already.
local id, photo, filename, keep_seconds, posted, most_jobs, overdue = unpack(ARGV)
local longest_pause, share = 3, 0.5  -- seconds; of the memory, or there would be no room for images
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
local used = #photo + (redis.call('GET', 'faces:bytes') or 0)

if now > posted + longest_pause then
  return 'Redis is away (--redis-url).'
elseif redis.call('ZCARD', 'faces:jobs') >= tonumber(most_jobs) then
  return 'Too many photos wait (--queue).'
elseif memory > 0 and used > memory * share then
  return 'Redis is full of photos that wait (--maxmemory).'
end
redis.call('HSET', 'faces:photo:' .. id,
  'photo', photo, 'filename', filename, 'at', posted, 'keep_seconds', keep_seconds)
redis.call('ZADD', 'faces:jobs', now + overdue, id)
redis.call('INCRBY', 'faces:bytes', #photo)
return false
