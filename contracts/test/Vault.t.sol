// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Vault} from "../src/Vault.sol";
import {IVault} from "../src/interfaces/IVault.sol";
import {Fixture} from "./Fixture.sol";

contract VaultTest is Fixture {
    function testFuzz_depositCreditsTheBeneficiary(uint256 amount, address to) public {
        amount = within(amount, 1, type(uint128).max);
        vm.assume(to != address(0) && to != vm.addr(PAYER));
        token.mint(address(this), amount);
        token.approve(address(vault), amount);
        same(vault.deposit(address(token), amount, to), amount, "credited");
        same(balance(to), amount, "balance");
        same(vault.liabilities(address(token)), PURSE + amount, "I1");
    }

    function testFuzz_nativeDepositTakesExactlyItsValue(uint256 amount, uint256 value) public {
        amount = within(amount, 1, 1 ether);
        value = within(value, 0, 1 ether);
        vm.deal(address(this), value);
        if (amount != value) vm.expectRevert(abi.encodeWithSelector(IVault.Vault_WrongValue.selector, amount, value));
        vault.deposit{value: value}(address(0), amount, address(this));
    }

    function testFuzz_withdrawNeverPaysMoreThanTheBalance(uint256 amount) public {
        address payer = vm.addr(PAYER);
        vm.prank(payer);
        if (amount == 0) {
            vm.expectRevert(abi.encodeWithSelector(IVault.Vault_ZeroAmount.selector));
        } else if (amount > PURSE) {
            vm.expectRevert(
                abi.encodeWithSelector(IVault.Vault_Insufficient.selector, address(token), payer, PURSE, amount)
            );
        }
        vault.withdraw(address(token), amount, vm.addr(MALLORY));
        bool paid = amount > 0 && amount <= PURSE;
        same(token.balanceOf(vm.addr(MALLORY)), paid ? amount : 0, "paid");
        same(balance(payer), paid ? PURSE - amount : PURSE, "left");
    }

    function testFuzz_strangersMoveNothing(address stranger, uint256 amount) public {
        vm.assume(stranger != address(channels));
        bytes memory no = abi.encodeWithSelector(IVault.Vault_NotModule.selector, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        vault.lock(address(token), vm.addr(PAYER), amount);
        vm.prank(stranger);
        vm.expectRevert(no);
        vault.release(address(token), stranger, amount);
    }

    function testFuzz_aModuleReleasesOnlyItsOwnLock(uint128 locked, uint256 wanted) public {
        locked = uint128(within(locked, 1, PURSE));
        vm.assume(wanted > locked);
        vm.prank(address(channels));
        vault.lock(address(token), vm.addr(PAYER), locked);
        vm.prank(address(channels));
        vm.expectRevert(
            abi.encodeWithSelector(
                IVault.Vault_ReleaseExceedsLocked.selector, address(channels), address(token), locked, wanted
            )
        );
        vault.release(address(token), vm.addr(MALLORY), wanted);
    }

    function test_sealIsOnceAndDeployersOnly() public {
        address[] memory none = new address[](0);
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_AlreadySealed.selector));
        vault.seal(none);
        Vault fresh = new Vault(address(this), 0);
        vm.prank(vm.addr(MALLORY));
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_NotDeployer.selector, vm.addr(MALLORY)));
        fresh.seal(none);
        fresh.setToken(address(token), true);
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_NotSealed.selector));
        fresh.deposit(address(token), 1, address(this));
    }
}
