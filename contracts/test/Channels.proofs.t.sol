// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IChannels} from "../src/interfaces/IChannels.sol";
import {Fixture} from "./Fixture.sol";

/// @dev Proved by halmos for every value of the arguments, not tried for some: `scripts/check-proofs`. Plain `require`s are
/// assumptions of nothing here: a path that reverts in the contract proves nothing and is skipped, so each proof also has a
/// test in Channels.t.sol that shows it is not empty.
contract ChannelsProofs is Fixture {
    /// I2, I4: whatever the signature bytes are, claimed stays between what it was and the least of allocated and voucher.
    function check_claimStaysInside(
        uint128 allocated,
        uint128 first,
        uint128 amount,
        uint128 ceiling,
        bytes32 r,
        bytes32 s,
        uint8 v
    ) public {
        vm.assume(allocated > 0 && allocated <= PURSE && first <= allocated);
        allocate(allocated);
        claim(first, first, SESSION);
        uint128 before = channels.channel(id).claimed;
        IChannels.ClaimEntry[] memory entries = new IChannels.ClaimEntry[](1);
        entries[0] = IChannels.ClaimEntry(config, amount, ceiling, abi.encodePacked(r, s, v));
        uint256 added = channels.claim(entries);
        uint128 after_ = channels.channel(id).claimed;
        assert(after_ >= before && after_ <= allocated);
        assert(after_ - before == added);
        assert(added == 0 || (after_ == amount && amount <= ceiling));
        assert(channels.owed(config.receiver, address(token)) == after_);
    }

    /// I6, I1: a close pays and returns exactly what was allocated, and the lock is empty.
    function check_closeSplitsEverything(uint128 allocated, uint128 claimed, uint128 last) public {
        vm.assume(allocated > 0 && allocated <= PURSE && claimed <= last && last <= allocated);
        allocate(allocated);
        claim(claimed, claimed, SESSION);
        channels.close(
            config,
            last,
            last,
            signed(SESSION, channels.voucherDigest(id, last)),
            signed(WORKER, channels.closeDigest(id, last))
        );
        assert(balance(config.payer) == PURSE - last);
        assert(balance(config.receiver) + channels.owed(config.receiver, address(token)) == last);
        assert(vault.lockedBy(address(channels), address(token)) == channels.owed(config.receiver, address(token)));
        assert(vault.liabilities(address(token)) == PURSE);
    }

    /// I5: no withdrawal ends before its delay, whatever the clock says.
    function check_withdrawalWaits(uint40 delay, uint40 waited) public {
        vm.assume(delay >= 15 minutes && delay <= 30 days && waited < delay);
        config.withdrawDelay = delay;
        id = channels.channelIdOf(config);
        allocate(100);
        vm.prank(config.payerAuthorizer);
        channels.initiateWithdraw(config);
        vm.warp(block.timestamp + waited);
        (bool ended,) = address(channels).call(abi.encodeCall(channels.finalizeWithdraw, (config)));
        assert(!ended);
    }
}
